"""Texts that begin as others did: what is not read again changes nothing, wherever it was kept."""

import dataclasses
import os

import ml_dtypes
import numpy as np
import pytest

from tests.infer.engine.test_scheduler import compilations, served
from tests.models import OnMesh, three
from v4_jax.cache.pages import tokens_to_refill
from v4_jax.infer.engine.requests import Request
from v4_jax.infer.engine.sampling import GREEDY, Sampling
from v4_jax.infer.engine.scheduler import Engine
from v4_jax.infer.prefix_cache.cache import PrefixCache, PrefixCacheOptions, PrefixMatch
from v4_jax.infer.prefix_cache.hashes import BlockHashes
from v4_jax.infer.prefix_cache.store import Directory, PageStore
from v4_jax.placement import Place

LENGTH, CHUNK, ROOM = 896, 256, 1 << 30


@pytest.fixture(scope="module")
def small():
    """One layer of each role, and a block to draft with."""
    return three()


def make_engine(model, prefix_cache=None, slots=2, **arguments):
    arguments = dict(max_length=LENGTH, prefill_chunk=CHUNK, policy="float32", cache_dtype="float32") | arguments
    return Engine(model.config, model.params, slots=slots, prefix_cache=prefix_cache, **arguments)


def text(seed, length):
    return np.random.default_rng(seed).integers(2, 64, length).tolist()


def cached(engine, request):
    """Tokens that were not read, by sample, and what was generated."""
    engine.submit(request)
    events = list(engine.run())
    return {event.cached for event in events}, [event.id for event in events], [event.logprob for event in events]


FIRST = text(1, 700)


def followers():
    """What is asked after FIRST: as much in common as the key says, and then something else."""
    common = (0, 127, 128, 129, 256, 300, 384, 511, 512, 640, 699, 700)
    return {length: Request([*FIRST[:length], *text(length + 2, 21)], 4, GREEDY, stop_ids=()) for length in common}


@pytest.fixture(scope="module")
def cold(small):
    """What they get when each is read from its first token."""
    engine = make_engine(small)
    return {length: cached(engine, request) for length, request in followers().items()}


def expected(config, mode, draft, common):
    whole = common // 128 * 128
    return {
        "full": whole,
        256: max(common // 256 * 256, whole - tokens_to_refill(config, draft=draft != "none")),
        "none": max(0, whole - tokens_to_refill(config, draft=draft != "none")),
    }[mode]


@pytest.fixture(scope="module")
def engine(small):
    """Keeps every tail; what it has kept before, and where, is for each test to say."""
    return make_engine(small, PrefixCacheOptions(ROOM))


def keep(engine, options):
    """Forgets what was kept, and keeps it elsewhere from here on."""
    pager = engine._pager
    pager.drain()
    pager.prefix_cache = PrefixCache(options, b"root", tokens_to_refill(engine.config, draft=False))
    return engine


@pytest.mark.parametrize(
    ("mode", "draft"), [("full", "none"), (256, "none"), ("none", "none"), ("full", "mtp:2"), ("none", "mtp:2")]
)
def test_a_hit_gives_what_reading_gives(small, cold, mode, draft):
    """With other texts in the slots meanwhile; a prompt that was read whole is found but for its last token."""
    engine = make_engine(small, PrefixCacheOptions(ROOM, mode), draft=draft)
    assert cached(engine, Request(FIRST, 1, stop_ids=()))[0] == {0}
    for common, request in followers().items():
        found, ids, logprobs = cached(engine, request)
        assert found == {expected(small.config, mode, draft, common)}
        assert ids == cold[common][1]
        np.testing.assert_allclose(logprobs, cold[common][2], atol=1e-4)
    assert cached(engine, Request(FIRST, 1, stop_ids=()))[0] == {expected(small.config, mode, draft, 699)}
    whole, ids, _ = cached(engine, Request(FIRST, 0, stop_ids=(), echo=True))  # of what is found no scores are known
    assert whole == {0} and ids == FIRST[1:]
    assert engine.programs == 6


@pytest.mark.parametrize("cache_dtype", ["float32", "bfloat16"])
def test_bit_by_bit_where_chunks_are_pages(small, cache_dtype):
    """A hit is then cut as the whole text is; sampled, penalised, several samples at once."""
    sampling = Sampling(seed=4, repetition_penalty=1.3, presence_penalty=0.5)
    request = Request(FIRST[:400], 40, sampling, stop_ids=(), n=2)
    engine = make_engine(small, PrefixCacheOptions(ROOM), prefill_chunk=128, cache_dtype=cache_dtype)
    [apart] = served(engine, [request])
    served(engine, [Request(text(9, 300), 30), Request(text(10, 200), 30)])
    numbers = [engine.submit(request)]
    events = list(engine.run())
    assert {event.cached for event in events} == {384}
    for sample, (ids, logprobs, _) in enumerate(apart):
        mine = [event for event in events if (event.request, event.sample) == (numbers[0], sample)]
        assert [event.id for event in mine] == ids and [event.logprob for event in mine] == logprobs


@pytest.mark.parametrize("draft", ["mtp:1", "mtp:4"])
def test_what_was_generated_is_found_too(small, engine, draft):
    """As the next message of a chat does, at every depth of drafts."""
    plain, engine = keep(engine, PrefixCacheOptions(0)), make_engine(small, PrefixCacheOptions(ROOM), draft=draft)
    _, answer, _ = cached(engine, Request(FIRST[:100], 300, stop_ids=()))
    following = Request([*FIRST[:100], *answer, *text(3, 9)], 5, GREEDY, stop_ids=())
    found, ids, logprobs = cached(engine, following)
    # Deep drafts may have overwritten the windows of a page before they could be kept; the page is there nevertheless.
    assert found == {384} if draft == "mtp:1" else found < {256, 384}
    _, ids_plain, logprobs_plain = cached(plain, following)
    assert ids == ids_plain
    cached(keep(plain, PrefixCacheOptions(ROOM)), Request(FIRST[:100], 300, stop_ids=()))
    assert cached(plain, following) == ({384}, ids_plain, pytest.approx(logprobs_plain, abs=1e-4))
    np.testing.assert_allclose(logprobs, logprobs_plain, atol=1e-4)


def test_together_and_in_turn(small):
    """Requests in one line share what the first of them reads; nothing compiles."""
    engine = make_engine(small, PrefixCacheOptions(ROOM), slots=4)
    engine.compile()
    given = [Request([*FIRST[:600], *text(i, 30)], 6, Sampling(seed=i), stop_ids=()) for i in range(6)]
    with compilations() as compiled:
        numbers = [engine.submit(request) for request in given]
        events = list(engine.run())
    assert len(compiled) == 1
    assert {event.request: event.cached for event in events} == {n: 0 if n == numbers[0] else 512 for n in numbers}
    plain = make_engine(small, slots=4)
    for number, [(ids, _, _)] in zip(numbers, served(plain, given), strict=True):
        assert [event.id for event in events if event.request == number] == ids


def test_memory_is_kept_within_bounds(engine, cold):
    """What was not used for longest goes first; answers stay what they are."""
    cached(keep(engine, PrefixCacheOptions(ROOM)), Request(FIRST, 1, stop_ids=()))
    engine._pager.drain()
    most = engine._pager.prefix_cache.nbytes * 3 // 4
    keep(engine, PrefixCacheOptions(most))
    for common, request in 2 * list(followers().items()):
        found, ids, _ = cached(engine, request)
        assert ids == cold[common][1] and found <= {*range(0, common + 1, 128)}
        assert engine._pager.prefix_cache.nbytes <= most
    assert engine._pager.prefix_cache.nbytes > most // 2
    keep(engine, PrefixCacheOptions(0))
    assert [cached(engine, Request(FIRST, 1, stop_ids=()))[0] for _ in range(2)] == [{0}, {0}]


def test_ends_of_texts_are_forgotten_before_their_beginnings():
    cache = PrefixCache(PrefixCacheOptions(6 * 64), b"root", refill=128)
    one, other = (BlockHashes(b"root", text(seed, 4 * 128)).hashes for seed in (1, 2))
    for key in one:
        cache.put_page(key, {"csa.0": np.zeros(8)})
    cache.touch(one)
    for key in other:
        cache.put_page(key, {"csa.0": np.zeros(8)})
    assert [cache.match(keys).pages for keys in (one, other)] == [2, 4]


def test_matches():
    """The shorter way: from a tail, or over pages that refill the windows."""
    cache = PrefixCache(PrefixCacheOptions(1 << 20, 512), b"root", refill=384)
    keys = BlockHashes(b"root", list(range(128 * 8))).hashes
    same, other = (BlockHashes(root, list(range(300))).hashes for root in (b"root", b"other"))
    assert len(keys) == 8 and keys[:2] == same != other
    for i, key in enumerate(keys, 1):
        cache.put_page(key, {"csa.0": np.zeros(8)})
        if cache.wants_tail(key, 128 * i):
            cache.put_tail(key, {"window.0": np.zeros(8)})
    assert [cache.match(keys[:n])[:2] for n in range(9)] == [
        (0, 0), (0, 0), (0, 0), (0, 0), (4, 512), (4, 512), (4, 512), (4, 512), (8, 1024)
    ]  # fmt: skip
    cache = PrefixCache(PrefixCacheOptions(1 << 20, 1024), b"root", refill=384)
    for key in keys:
        cache.put_page(key, {"csa.0": np.zeros(8)})
    assert [cache.match(keys[:n]) for n in (3, 4, 8)] == [
        PrefixMatch(0, 0, None),
        PrefixMatch(4, 128, None),
        PrefixMatch(8, 640, None),
    ]


def test_across_restarts(small, cold, tmp_path):
    """A directory is found again by the same model alone."""
    options = PrefixCacheOptions(0, "full", tmp_path / "pages")
    first = make_engine(small, options)
    cached(first, Request(FIRST, 1, stop_ids=()))
    first.close()
    assert all(file.suffix == ".pages" and file.stat().st_mode & 0o777 == 0o600 for file in options.directory.iterdir())

    again = make_engine(small, dataclasses.replace(options, memory=ROOM))
    for common in (300, 700):
        found, ids, logprobs = cached(again, followers()[common])
        assert (found, ids) == ({common // 128 * 128}, cold[common][1])
        np.testing.assert_allclose(logprobs, cold[common][2], atol=1e-4)
    again.close()

    embed = small.params["embed"].at[7, 5].add(0.01)
    other = small._replace(params={**small.params, "embed": embed})
    changed = (make_engine(other, options), make_engine(small, options, cache_dtype="bfloat16"))
    keys = [one._pager.prefix_cache.hashes(FIRST).hashes for one in (first, again, *changed)]
    assert keys[0] == keys[1] and len({one[0] for one in keys}) == 3
    for one in changed:
        assert one._pager.prefix_cache.match(one._pager.prefix_cache.hashes(FIRST).hashes).tokens == 0


def test_salts_keep_texts_apart(engine):
    """Of the prompt, and of what was generated after it; without a salt nothing is found of one either."""
    keep(engine, PrefixCacheOptions(ROOM))
    first = Request(FIRST[:300], 1, stop_ids=())
    for salt, found in ((b"a", 0), (b"b", 0), (b"", 0), (b"a", 256), (b"b", 256), (b"", 256)):
        assert cached(engine, dataclasses.replace(first, salt=salt))[0] == {found}


def test_damaged_and_missing_files(engine, cold, tmp_path):
    """Are as if they had never been there; what remains is used."""
    options = PrefixCacheOptions(0, "full", tmp_path)
    cached(keep(engine, options), Request(FIRST, 1, stop_ids=()))
    engine.close()
    keys = engine._pager.prefix_cache.hashes(FIRST[:-1]).hashes
    files = [(tmp_path / f"{key.hex()}.page.pages", tmp_path / f"{key.hex()}.tail.pages") for key in keys]
    half_written, other = tmp_path / f".{files[0][0].name}.abc", tmp_path / "notes.txt"
    half_written.write_bytes(b"x")
    other.write_bytes(b"x")
    os.utime(half_written, (1, 1))
    keep(engine, options)
    assert other.exists() and not half_written.exists()

    data = bytearray(files[4][1].read_bytes())
    data[len(data) // 2] ^= 1
    files[4][1].write_bytes(data)
    with pytest.warns(UserWarning, match="is damaged and was removed"):
        assert cached(engine, Request(FIRST[:690], 1, stop_ids=()))[0] == {512}
    engine.close()
    assert files[4][1].exists()  # it was made anew

    keep(engine, options)
    files[3][0].write_bytes(files[3][0].read_bytes()[:-100])
    with pytest.warns(UserWarning, match="is damaged and was removed"):
        assert cached(engine, followers()[700])[:2] == ({384}, cold[700][1])
    engine.close()

    files[3][1].unlink()
    keep(engine, options)
    files[4][0].write_bytes(b"")  # known only when the pages before it are put back, past the last tail that is left
    with pytest.warns(UserWarning, match="is damaged and was removed"):
        assert cached(engine, followers()[700])[:2] == ({384}, cold[700][1])
    engine.close()

    keep(engine, options)
    for page, tail in files[1:]:
        page.unlink(), tail.unlink()
    assert cached(engine, followers()[700])[:2] == ({128}, cold[700][1])
    engine.close()


@pytest.mark.parametrize("kind", ["flipped", "cut", "empty", "swapped", "other", "folder", "pipe", "huge"])
def test_pages_that_are_none(tmp_path, kind):
    """Whatever lies under a page's name, it is a miss and never an error."""
    item = {"csa.0": np.arange(24, dtype=ml_dtypes.bfloat16).reshape(2, 3, 4), "csa.1": np.float32([1.5])}
    directory = Directory(tmp_path, 1 << 20)
    for name in ("a", "b"):
        directory.put(name, item | {"csa.1": np.float32([ord(name)])})
    directory.close()
    directory = Directory(tmp_path, 1 << 20)
    found = directory.get("a")
    assert {key: (x.dtype, x.tolist()) for key, x in found.items()} == {
        key: (x.dtype, x.tolist()) for key, x in (item | {"csa.1": np.float32([97])}).items()
    }
    a, b = tmp_path / "a.pages", tmp_path / "b.pages"
    content = bytearray(a.read_bytes())
    if kind == "swapped":
        os.replace(b, a)
    elif kind in ("folder", "pipe"):
        a.unlink()
        a.mkdir() if kind == "folder" else os.mkfifo(a)
    elif kind == "flipped":
        content[-1] ^= 1
        a.write_bytes(content)
    else:
        a.write_bytes({"cut": content[:-7], "empty": b"", "other": b"\xff" * 100, "huge": bytes(3 << 20)}[kind])
    with pytest.warns(UserWarning, match="is damaged and was removed"):
        assert directory.get("a") is None
    assert directory.get("a") is None and "a" not in directory


def test_a_directory_is_kept_within_bounds(engine, tmp_path):
    def size():
        return sum(file.stat().st_size for file in tmp_path.iterdir())

    options = PrefixCacheOptions(0, "full", tmp_path)
    cached(keep(engine, options), Request(FIRST, 1, stop_ids=()))
    engine.close()
    most = size() // 2
    keep(engine, dataclasses.replace(options, disk=most))
    assert 0 < size() <= most
    cached(engine, Request(text(5, 700), 1, stop_ids=()))
    engine.close()
    assert 0 < size() <= most


def test_a_directory_keeps_what_memory_serves(tmp_path):
    """What is found in memory is used all the same, and not what the directory forgets first."""
    item, most = {"csa.0": np.zeros(1000, np.uint8)}, 2500
    store = PageStore(0, Directory(tmp_path, most))
    store.put("a", item)
    store.put("b", item)
    store.close()
    (tmp_path / "of_others.pages.old").write_bytes(bytes(2000))  # which does not count
    store = PageStore(1 << 20, Directory(tmp_path, most))
    assert store.get("a") and store.get("b")  # from now on in memory, too
    store.touch(["a"])
    store.put("c", item)
    store.close()
    assert {file.name for file in tmp_path.iterdir()} == {"a.pages", "c.pages", "of_others.pages.old"}


def test_a_directory_that_cannot_be_written_to(engine, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    keep(engine, PrefixCacheOptions(ROOM, "full", tmp_path))
    monkeypatch.setattr("v4_jax.infer.prefix_cache.store._packed", full)
    with pytest.warns(UserWarning, match="pages are not kept in .*: No space left on device"):
        cached(engine, Request(FIRST, 1, stop_ids=()))
        engine.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mesh", "mode"), [("seq=2,expert=2", "none"), ("seq=2,expert=2", "full"), ("data=2,tensor=2", "full")]
)
def test_on_a_mesh(small, cold, mesh, mode):
    spread = OnMesh(small, mesh, "long-context")
    engine = make_engine(spread, PrefixCacheOptions(ROOM, mode), slots=4, place=Place(spread.mesh, spread.preset))
    cached(engine, Request(FIRST, 1, stop_ids=()))
    for common in (129, 300, 700):
        found, ids, logprobs = cached(engine, followers()[common])
        assert found == {expected(small.config, mode, 0, common)}
        assert ids == cold[common][1]
        np.testing.assert_allclose(logprobs, cold[common][2], atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (dict(memory=-1), "memory is -1, expected 0 bytes or more"),
        (dict(memory=1, disk=-1), "disk is -1, expected 0 bytes or more"),
        (dict(memory=1, windows=100), "windows is 100, expected 'full', 'none', or tokens, a multiple of 128"),
        (dict(memory=1, windows=0), "windows is 0, expected 'full', 'none', or tokens, a multiple of 128"),
    ],
)
def test_sizes_out_of_range(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        PrefixCacheOptions(**arguments)
