import pytest
import torch

from tests.goldens import (
    RUNS,
    assert_stages_match,
    golden_engine,
    pixels_of,
    runs_of,
    tensors_of,
)
from vla2cli.frontend.pytorch import TorchFrontend

SEEN = [run for run in RUNS if run[1] not in ("mt", "txt")]


@pytest.mark.parametrize(("case", "run"), SEEN, ids=["-".join(run) for run in SEEN])
@pytest.mark.parametrize("make", [TorchFrontend, TorchFrontend.fast], ids=["plain", "packed"])
def test_frontend_makes_the_references_tokens(make, case, run):
    model, expected = golden_engine(case).model, tensors_of(case, run)
    frontend = make(model)
    (features,) = frontend.vision_features([pixels_of(case, run)])
    if runs_of(case)[run]["modal"] == "image":
        features = model.repeat_image(features)
    (tokens,) = frontend.visual_tokens([features])
    found = {"vision_features": features, "projector_tokens": tokens[None]}
    assert_stages_match(f"{case} {run}", found, expected)


def test_clips_together_give_what_each_gives_alone():
    frontend = TorchFrontend.fast(golden_engine("mistral_clip_stc_8f").model)
    clips = [torch.randn(n, 3, 56, 56) for n in (1, 8, 3)]
    together = frontend.vision_features(clips)
    for clip, features in zip(clips, together, strict=True):
        torch.testing.assert_close(features, frontend.vision_features([clip])[0], atol=1e-5, rtol=0)
