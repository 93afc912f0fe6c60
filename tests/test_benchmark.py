"""The benchmark compares like with like."""

import torch

from benchmark import random_batch, ratios, separate_losses
from mamo import MAMO, Config


def test_separate_passes_give_the_same_losses_and_gradients():
    torch.manual_seed(0)
    config = Config(image_size=(16, 16), patch_size=4, width=16, heads=2, embed_dim=8, vocab_size=60, ema=0.9)
    model, batch = MAMO(config), random_batch(config, 6, 9)
    found = []
    for losses in (model(batch), separate_losses(model, batch, "passes"), separate_losses(model, batch)):
        model.zero_grad()
        sum(loss for name, loss in losses.items() if name in config.weights).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((torch.stack([losses[name] for name in config.weights]), gradient))
    for values, gradient in found[1:]:
        torch.testing.assert_close(values, found[0][0])
        torch.testing.assert_close(gradient, found[0][1], rtol=1e-3, atol=1e-6)


def test_a_ratio_is_the_median_of_the_rounds():
    ratio = ratios({"a": [1.0, 2.0, 9.0], "b": [2.0, 2.0, 3.0]}, "a", "b")
    assert ratio == {"median": 1.0, "min": 0.5, "max": 3.0, "rounds": 3}
