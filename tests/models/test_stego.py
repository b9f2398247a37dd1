"""STEGO's head and clusters against loops."""

import torch

from models.stego import ClusterProbe, SegmentationHead


def test_codes_are_a_linear_map_plus_one_with_a_hidden_layer():
    head, features = SegmentationHead(6, 4).double().eval(), torch.randn(2, 6, 3, 5, dtype=torch.float64)
    kept, codes = head(features)
    assert torch.equal(kept, features) and codes.shape == (2, 4, 3, 5)
    weight, bias = head.linear.weight[:, :, 0, 0], head.linear.bias
    (first, _, second), patch = head.nonlinear, features[1, :, 2, 4]
    hidden = (first.weight[:, :, 0, 0] @ patch + first.bias).clamp(min=0)
    expected = weight @ patch + bias + second.weight[:, :, 0, 0] @ hidden + second.bias
    torch.testing.assert_close(codes[1, :, 2, 4], expected)


def test_in_training_whole_channels_are_dropped():
    kept, _ = SegmentationHead(200, 4).train()(torch.ones(4, 200, 3, 3))
    dropped = (kept == 0).all((2, 3))
    assert (kept.eq(0).any(3).any(2) == dropped).all() and 0.05 < dropped.double().mean() < 0.16
    torch.testing.assert_close(kept[~dropped], torch.full_like(kept[~dropped], 1 / 0.9))


def test_clusters_are_those_of_cosine_and_codes_get_no_gradient():
    probe = ClusterProbe(4, 3).double()
    codes = torch.randn(2, 4, 3, 2, dtype=torch.float64, requires_grad=True)
    cosines, best = probe(codes), []
    for b in range(2):
        for y in range(3):
            for x in range(2):
                code = codes[b, :, y, x].detach()
                own = torch.stack([code @ center / (code.norm() * center.norm()) for center in probe.centers.detach()])
                torch.testing.assert_close(cosines[b, :, y, x].detach(), own)
                best.append(own.max())
    loss = probe.loss(codes)
    torch.testing.assert_close(loss.detach(), -torch.stack(best).mean())
    loss.backward()
    assert codes.grad is None and probe.centers.grad.abs().sum() > 0
