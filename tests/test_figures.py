"""The picture that moves: figures/freezing.gif shows what results/ has recorded."""

import math
import sys

import pytest
from test_readme import ROOT

pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT / "figures"))
import make  # noqa: E402

PATH = ROOT / "figures/freezing.gif"


@pytest.fixture
def run(monkeypatch):
    """The recorded run, of the quick preset."""
    monkeypatch.setattr(make.results, "FOLDER", ROOT / "results/quick")
    one, = make.cells_of("sst2", make.AFLORA, [0])
    return one


def test_the_animation_is_calm():
    """Below 1 MB, a frame for each look that froze, and a rest on the last."""
    from PIL import Image
    assert PATH.stat().st_size < 1_000_000
    with Image.open(PATH) as picture:
        durations = []
        for i in range(picture.n_frames):
            picture.seek(i)
            durations.append(picture.info["duration"])
    assert 10 < len(durations) < 40
    assert min(durations) >= 300
    assert durations[-1] >= 3000


@pytest.mark.parametrize("step", [0, 130, 564])
def test_a_frame_shows_the_recorded_run(run, step):
    """The step of every frozen matrix stands in the map, live ones are blue; both counts fit."""
    _, (left, right) = make.plt.subplots(1, 2)
    make.draw_live(left, run, step)
    make.draw_share(right, run, step)
    frozen = [at for at in run["frozen_at"].values() if at <= step]
    assert sorted(int(text.get_text()) for text in left.texts) == sorted(frozen)
    blue = make.matplotlib.colors.to_rgba(make.BLUE)
    assert sum(patch.get_facecolor() == blue for patch in left.patches) == 24 - len(frozen)
    assert right.get_title() == f"{len(frozen)} of 24 matrices frozen"
    wide = {"intermediate.lora_A": 4 * 384, "intermediate.lora_B": 4 * 1536,
            "output.lora_A": 4 * 1536, "output.lora_B": 4 * 384}
    trained = 20_880
    for name, at in run["frozen_at"].items():
        trained += wide[name.split(".", 3)[3]] * (at > step)
    assert left.get_title() == f"step {step}: {trained:,} adapter parameters train"
    plan, realised, _ = right.lines
    assert realised.get_ydata()[-1] == pytest.approx(100 * len(frozen) / 24)
    for at, share in zip(realised.get_xdata()[:-1], realised.get_ydata()):
        r = plan.get_ydata()[at]
        assert share <= r + 1e-9
        assert at == 0 or math.floor(r / 100 * 24 + 1e-9) >= round(share / 100 * 24)
    make.plt.close("all")


def test_frames_are_the_looks_that_froze(run):
    """The animation begins before the ramp and ends when everything is frozen."""
    moments = make.moments_of(run)
    assert moments[0] == 56  # t_i
    assert sorted(set(moments))[1:] == sorted(set(run["frozen_at"].values()))
    assert moments[-1] == 338
