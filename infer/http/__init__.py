"""The HTTP server: every API's paths over one engine, with keys, limits, metrics and a log."""
