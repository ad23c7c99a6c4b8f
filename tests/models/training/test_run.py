from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.network import NetworkConfig
from models.training.fit import fit
from models.training.fit_config import FitConfig
from models.training.rqvae import RQVAE
from models.training.run import Run, bf16_of, device_of

SMALL = FitConfig(codebook_sizes=(8, 8, 8), latent=4, hidden=(16,), epochs=6, batch_rows=128, learning_rate=3e-3)
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_bf16_is_of_the_networks_and_the_quantizer_stays_in_float32(clustered):
    # given
    model = RQVAE(NetworkConfig((12, 16, 4)), (8, 8))
    model.bf16 = True
    seen = {}
    model.network.layers[0].register_forward_hook(lambda *tensors: seen.update(network=tensors[2].dtype))
    model.decoder.layers[0].register_forward_hook(lambda *tensors: seen.update(decoder=tensors[2].dtype))
    # when
    output = model(clustered[:32])
    output.reconstruction.sum().backward()
    # then
    assert seen == {"network": torch.bfloat16, "decoder": torch.bfloat16}
    assert output.latents.dtype == output.quantization.residuals.dtype == output.reconstruction.dtype == torch.float32
    assert {parameter.grad.dtype for parameter in model.network.parameters()} == {torch.float32}
    assert torch.equal(output.quantization.codes, model.quantizer.quantize(output.latents).codes)


def test_a_fit_in_bf16_is_about_as_good_and_frozen_in_float32(clustered):
    # when
    exact, fast = fit(clustered, SMALL), fit(clustered, SMALL, run=Run(bf16=True))
    # then
    assert {tensor.dtype for tensor in fast.model.state_dict().values()} == {torch.float32, torch.bool}
    assert fast.records[0].held_out == exact.records[0].held_out
    assert fast.records[1].held_out != exact.records[1].held_out
    assert fast.best.value == pytest.approx(exact.best.value, rel=0.15)
    again = fit(clustered, SMALL, run=Run(bf16=True))
    assert again.history == fast.history


def test_devices_are_checked_before_any_work():
    assert device_of("cpu") == torch.device("cpu")
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:", "cuda:x", "cpu:0"):
        with pytest.raises(ValueError, match="none of auto, cpu, cuda"):
            device_of(name)
    with pytest.raises(ValueError, match="is not there"):
        device_of("cuda:99")


def test_auto_takes_bf16_on_a_gpu_alone():
    cpu = torch.device("cpu")
    assert [bf16_of(name, cpu) for name in ("auto", "fp32", "bf16")] == [False, False, True]
    with pytest.raises(ValueError, match="none of auto, fp32, bf16"):
        bf16_of("fp16", cpu)


@cuda
@pytest.mark.parametrize("bf16", [False, True])
def test_a_fit_on_a_gpu_comes_back_to_the_cpu_in_float32(bf16, clustered):
    fitted = fit(clustered, SMALL, run=Run(torch.device("cuda"), bf16=bf16))
    assert {(tensor.device.type, tensor.dtype) for tensor in fitted.model.state_dict().values()} == {
        ("cpu", torch.float32),
        ("cpu", torch.bool),
    }
    assert fitted.best.value == pytest.approx(fit(clustered, SMALL).best.value, rel=0.15)


@cuda
def test_a_fit_on_a_gpu_moves_dead_codewords_and_goes_by_weight(clustered):
    weights = torch.rand(600) + 0.1
    config = replace(SMALL, codebook_sizes=(64, 512), start="random", warm_up_epochs=1)
    fitted = fit(clustered, config, weights, run=Run(torch.device("cuda")))
    assert sum(level.restarted for record in fitted.records for level in record.levels) > 0
