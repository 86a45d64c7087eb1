"""tvdcn's README examples, its import changed."""

import torch

import deformnd
import deformnd.compat.tvdcn as tvdcn


def test_functions():
    from deformnd.compat.tvdcn.ops import deform_conv2d

    input = torch.rand(4, 3, 10, 10)
    weight = torch.rand(5, 3, 3, 3)
    offset = torch.rand(4, 2 * 3 * 3, 8, 8)
    mask = torch.rand(4, 3 * 3, 8, 8)
    bias = torch.rand(5)
    output = deform_conv2d(
        input, weight, offset, mask, bias, stride=(1, 1), padding=(0, 0), dilation=(1, 1), groups=1
    )
    assert output.shape == (4, 5, 8, 8)
    assert tvdcn.ops.deform_conv2d is deform_conv2d is tvdcn.deform_conv2d


def test_modules():
    from deformnd.compat.tvdcn import DeformConv2d, PackedDeformConv1d

    conv = DeformConv2d(3, 16, kernel_size=(3, 3))
    output = conv(torch.rand(2, 3, 64, 64), torch.rand(2, 18, 62, 62), torch.rand(2, 9, 62, 62))
    assert output.shape == (2, 16, 62, 62)
    conv = PackedDeformConv1d(3, 16, kernel_size=5, modulated=True, mask_activation="softmax")
    assert torch.jit.script(conv)(torch.rand(2, 3, 128)).shape == (2, 16, 124)


def test_every_name_of_tvdcn():
    families = [
        f"{p}DeformConv{t}{n}d"
        for p in ("", "Packed")
        for t in ("", "Transpose")
        for n in (1, 2, 3)
    ]
    functions = [f"deform_conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)]
    masks = ["MaskSigmoid", "mask_sigmoid"]
    masks += [f"{m}{n}d" for m in ("MaskSoftmax", "mask_softmax") for n in (1, 2, 3)]
    system = ["has_ops", "with_cuda", "cuda_version", "cuda_arch_list", "ops", "__version__"]
    for name in families + functions + masks + system:
        assert getattr(tvdcn, name) is getattr(deformnd, name)
