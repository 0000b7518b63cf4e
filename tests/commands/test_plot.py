"""`v4-jax plot`: runs in, a picture out."""

import json
import sys

import pytest

from v4_jax.commands import plot as plotting

PNG = b"\x89PNG\r\n\x1a\n"

# A run on which every step was logged, and one that is younger and says less.
FIRST = [
    {
        "step": step,
        "time": 1.7e9 + step,
        "loss": 6 / step,
        "mtp_loss": 7 / step,
        "balance": 1.0,
        "learning_rate": 2.7e-4,
        "gradient_norm": 1.0,
        "update_rms_muon": 0.18,
        "update_rms_adamw": 0.1,
        "expert_load_excess": 0.2,
        "tokens": 1000,
        "tokens_per_second": 500,
    }
    for step in range(1, 6)
]
SECOND = [{"step": step, "time": 1.7e9, "loss": 5 / step, "tokens": 2000} for step in (10, 20)]


def write(path, lines):
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def first(tmp_path):
    return write(tmp_path / "first", FIRST)


@pytest.fixture
def second(tmp_path):
    return write(tmp_path / "price_$5_$6", SECOND)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    drawn, draw = [], plotting.draw
    monkeypatch.setattr(plotting, "draw", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
    return drawn


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def is_a_picture(path):
    content = path.read_bytes()
    width, height = (int.from_bytes(content[i : i + 4], "big") for i in (16, 20))
    return content.startswith(PNG) and width > 1000 and height > 500 and len(content) > 10_000


def test_one_run(run, first, figures):
    result = run("plot", first)
    assert (result.code, result.err) == (0, f"wrote {first / 'metrics.png'}\n")
    assert is_a_picture(first / "metrics.png")
    assert sorted(path.name for path in first.iterdir()) == ["metrics.jsonl", "metrics.png"]
    assert "first" in result.out and "5,000" in result.out and "1.2000" in result.out
    assert titles(figures[0]) == [
        "loss and mtp loss",
        "learning rate",
        "gradient norm",
        "update rms muon and update rms adamw",
        "expert load excess",
        "tokens per second",
    ]
    loss, mtp = figures[0].axes[0].lines
    assert loss.get_xdata().tolist() == [1000, 2000, 3000, 4000, 5000]
    assert loss.get_ydata().tolist() == [6 / step for step in range(1, 6)]
    assert (loss.get_label(), mtp.get_label()) == ("loss", "mtp_loss")


def test_several_runs(run, first, second, tmp_path, figures):
    target = tmp_path / "both.png"
    assert run("plot", first, second, "--out", target).code == 0
    assert is_a_picture(target) and not (first / "metrics.png").exists()
    lines = figures[0].axes[0].lines
    assert [line.get_label() for line in lines] == ["first loss", "first mtp_loss", "price_$5_$6 loss"]
    assert lines[2].get_xdata().tolist() == [20_000, 40_000]  # a line for every tenth step


def test_chosen_metrics(run, first, figures):
    assert run("plot", first, "--metrics", "balance, learning_rate").code == 0
    assert titles(figures[0]) == ["learning rate", "balance"]


def test_runs_without_tokens(run, tmp_path, figures):
    write(tmp_path / "a", [{"step": 3, "loss": 1.0}, {"step": 4, "loss": None}])
    assert run("plot", tmp_path / "a").code == 0
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "step" and axes.lines[0].get_xdata().tolist() == [3, 4]


def test_a_run_that_is_going(run, first):
    with (first / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert run("plot", first).code == 0


def refusal(run, *arguments) -> str:
    result = run("plot", *arguments)
    assert (result.code, result.out, result.err.count("\n")) == (2, "", 1)
    return result.err


def test_no_run(run, tmp_path, first):
    assert "expected at least one directory" in refusal(run)
    assert "nowhere; expected a training run" in refusal(run, first, tmp_path / "nowhere")
    assert "has no metrics.jsonl; expected a training run" in refusal(run, tmp_path)


@pytest.mark.parametrize("content", ["", '{"step": 1, "time": 1.0}\n', '{"step": 1, "lo'])
def test_nothing_to_plot(run, first, content):
    (first / "metrics.jsonl").write_text(content)
    assert "metrics.jsonl holds no metrics yet; expected at least one line" in refusal(run, first)


def test_damaged_metrics(run, first):
    (first / "metrics.jsonl").write_text("what\n")
    assert "metrics.jsonl: line 1 is 'what', expected a JSON object" in refusal(run, first)


def test_an_unknown_metric(run, second):
    message = refusal(run, second, "--metrics", "loss,lss")
    assert message == "v4-jax: --metrics: no run has 'lss'; expected some of loss, tokens\n"


def test_bad_targets(run, first, tmp_path):
    assert "expected the name of a .png file" in refusal(run, first, "--out", tmp_path / "x.pdf")
    assert "there is no directory" in refusal(run, first, "--out", tmp_path / "nowhere" / "x.png")


def test_without_matplotlib(run, first, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "not installed; it comes with pip install 'v4-jax[train]'" in refusal(run, first)
    assert not (first / "metrics.png").exists()


def test_scores_of_some_steps_are_joined(run, tmp_path, figures):
    """Most lines have none: without what lies between, nothing would be seen of them."""
    scored = [line | ({"score": line["step"] / 10} if line["step"] % 2 == 0 else {}) for line in FIRST]
    assert run("plot", write(tmp_path / "scored", scored)).code == 0
    [axes] = [axes for axes in figures[0].axes if axes.get_title() == "score"]
    assert axes.lines[0].get_ydata().tolist() == [0.2, 0.4]
