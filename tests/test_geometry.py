"""Every check, tried as a new user would."""

import numpy as np
import pytest
import torch

import deformnd

X, W = torch.zeros(1, 6, 6, 6), torch.zeros(4, 6, 3, 3)
OFF, MASK, BIAS = torch.zeros(1, 18, 4, 4), torch.zeros(1, 9, 4, 4), torch.zeros(4)
SHAPES = "; input [1, 6, 6, 6], weight [4, 6, 3, 3]"
NESTED = {
    name: torch.nested.nested_tensor([X[0], X[0]], layout=getattr(torch, name))
    for name in ("strided", "jagged")
}
ORDER = (
    "; arguments are (input, weight, offset, mask, ...); torchvision's and mmcv's order is another"
)
conv2d, transpose2d = deformnd.deform_conv2d, deformnd.deform_conv_transpose2d


@pytest.mark.parametrize(
    "error, message, args, options",
    [
        (TypeError, "input is a list, expected a Tensor", ([1.0], W, OFF), {}),
        (TypeError, "weight is a NoneType, expected a Tensor", (X, None, OFF), {}),
        (TypeError, "offset is a int, expected a Tensor", (X, W, 3), {}),
        (
            ValueError,
            "input has 5 dimensions, expected 4 (batch, channels, 2 spatial) or 3 (unbatched); "
            "input [1, 6, 6, 6, 1], weight [4, 6, 3, 3], offset [1, 18, 4, 4]",
            (X[..., None], W, OFF),
            {},
        ),
        (
            ValueError,
            "weight has 3 dimensions, expected 4; input [1, 6, 6, 6], weight [6, 3, 3]",
            (X, W[0], OFF),
            {},
        ),
        (ValueError, "offset has 3 dimensions, expected 4" + SHAPES, (X, W, OFF[0]), {}),
        (
            ValueError,
            "mask has 4 dimensions, expected 3 as the unbatched input; input [6, 6, 6], ",
            (X[0], W, OFF[0], MASK),
            {},
        ),
        (
            ValueError,
            "input has 5 channels, expected 6 (weight.shape[1] 6 x groups 1); input [1, 5, 6, 6], "
            "weight [4, 6, 3, 3], offset [1, 18, 4, 4]",
            (X[:, :5], W, OFF),
            {},
        ),
        (
            ValueError,
            "weight has 4 output channels, expected a multiple of groups 3",
            (X, W[:, :2], OFF),
            {"groups": 3},
        ),
        (ValueError, "groups is 0, expected at least 1", (X, W, OFF), {"groups": 0}),
        (TypeError, "groups is 1.0, expected an int", (X, W, OFF), {"groups": 1.0}),
        (
            ValueError,
            "offset has 27 channels, expected a multiple of 18 (2 axes x 9 kernel points)" + SHAPES,
            (X, W, torch.zeros(1, 27, 4, 4)),
            {},
        ),
        (
            ValueError,
            "offset has 0 channels, expected a multiple of 18",
            (X, W, OFF[:, :0]),
            {},
        ),
        (
            ValueError,
            "mask has 10 channels, expected a multiple of 9 (9 kernel points)",
            (X, W, None, torch.zeros(1, 10, 4, 4)),
            {},
        ),
        (
            ValueError,
            "offset has 9 channels, expected a multiple of 18 (2 axes x 9 kernel points) "
            "(are offset and mask swapped?)",
            (X, W, MASK, OFF),
            {},
        ),
        (
            ValueError,
            "offset has spatial size (6, 6), expected the output's (4, 4) "
            "(stride (1, 1), padding (0, 0), dilation (1, 1))",
            (X, W, torch.zeros(1, 18, 6, 6)),
            {},
        ),
        (
            ValueError,
            "expected the output's (1, 1) "
            "(stride (2147483647, 2147483647), padding (0, 0), dilation (1, 1))",
            (X, W, OFF),
            {"stride": 2**31 - 1},
        ),
        (
            ValueError,
            "mask has spatial size (4, 4), expected the output's (6, 6) "
            "(stride (1, 1), padding (1, 1), dilation (1, 1))",
            (X, W, None, MASK),
            {"padding": 1},
        ),
        (
            ValueError,
            "mask has batch size 2, expected 1 as input",
            (X, W, OFF, MASK.expand(2, 9, 4, 4)),
            {},
        ),
        (
            ValueError,
            "offset has 4 groups (72 channels / 18), which do not divide the 6 input channels",
            (X, W, torch.zeros(1, 72, 4, 4)),
            {},
        ),
        (
            ValueError,
            "mask has 4 groups (36 channels / 9), which do not divide the 6 input channels",
            (X, W, None, torch.zeros(1, 36, 4, 4)),
            {},
        ),
        (ValueError, "bias has shape [5], expected [4]", (X, W, OFF, MASK, torch.zeros(5)), {}),
        (ValueError, "bias has shape [5], expected [4]", (X, W, None, None, torch.zeros(5)), {}),
        (TypeError, "input has dtype torch.int64, expected one of float16", (X.long(), W, OFF), {}),
        (TypeError, "input has dtype torch.int64", (X.long(), W.long()), {}),
        (TypeError, "input has dtype torch.complex64", (X.cfloat(), W.cfloat(), OFF), {}),
        (TypeError, "offset has dtype torch.int32", (X, W, OFF.int()), {}),
        (
            TypeError,
            "weight has dtype torch.float64, expected torch.float32",
            (X, W.double(), OFF),
            {},
        ),
        (TypeError, "bias has dtype torch.float16", (X, W, OFF, MASK, BIAS.half()), {}),
        (ValueError, "offset is on meta, expected cpu, where input is", (X, W, OFF.to("meta")), {}),
        (ValueError, "weight is on meta, expected cpu", (X, W.to("meta")), {}),
        (
            ValueError,
            "the output would have size (0, 4), expected at least 1 on every axis; the dilated "
            "kernel is larger than the padded input (stride (1, 1), padding (0, 0), "
            "dilation (3, 1))",
            (X, W, OFF),
            {"dilation": (3, 1)},
        ),
        (ValueError, "input has spatial size (0, 6)", (X[:, :, :0], W, OFF), {"padding": 3}),
        (ValueError, "weight has kernel size (3, 0)", (X, W[..., :0], OFF), {}),
        (
            ValueError,
            "stride is (1, 1, 1), expected an int or 2 ints",
            (X, W, OFF),
            {"stride": (1,) * 3},
        ),
        (ValueError, "padding is [1], expected an int or 2 ints", (X, W, OFF), {"padding": [1]}),
        (TypeError, "dilation is 1.5, expected an int or 2 ints", (X, W, OFF), {"dilation": 1.5}),
        (TypeError, "stride is None, expected an int or 2 ints", (X, W, OFF), {"stride": None}),
        (
            TypeError,
            "stride is a ndarray of shape [3], expected an int or 2 ints",
            (X, W, OFF),
            {"stride": np.arange(3)},
        ),
        (TypeError, "stride is True, expected an int or 2 ints", (X, W, OFF), {"stride": True}),
        (
            ValueError,
            "stride is (0, 1), expected at least 1 on every axis",
            (X, W, OFF),
            {"stride": (0, 1)},
        ),
        (ValueError, "padding is (-1, -1), expected at least 0", (X, W, OFF), {"padding": -1}),
        (
            ValueError,
            "padding is 'full', expected 'same', 'valid' or ints",
            (X, W, OFF),
            {"padding": "full"},
        ),
        (
            ValueError,
            "padding='same' expects stride 1, got [2, 2]",
            (X, W, OFF),
            {"padding": "same", "stride": 2},
        ),
        (
            ValueError,
            "dilation is [0, 0], expected at least 1 on every axis",
            (X, W, OFF),
            {"padding": "same", "dilation": 0},
        ),
        *(
            (ValueError, f"{key} is {value}, expected at most 2147483647", args, {key: value})
            for key in ("stride", "padding", "dilation", "groups")
            for value in (2**31, 2**63, 10**30, -(10**30))
            for args in ((X, W, OFF), (X, W))
        ),
        (ValueError, "stride is (1, 2147483648)", (X, W, OFF), {"stride": (1, 2**31)}),
        *(
            (ValueError, "expected at most 2^60 values (padding", args, {"padding": 2**31 - 1})
            for args in ((X, W, OFF), (X, W))
        ),
        *(
            (TypeError, f"input has layout {layout}, expected torch.strided", args, {})
            for t, layout in (
                (X.to_sparse(), "torch.sparse_coo"),
                (X.to_mkldnn(), "torch._mkldnn"),
            )
            for args in ((t, W, OFF), (t, W))
        ),
        *(
            (TypeError, f"{key} is a nested tensor of layout torch.{layout}", args, {})
            for layout in ("strided", "jagged")
            for key, args in (
                ("input", (NESTED[layout], W, OFF)),
                ("offset", (X, W, NESTED[layout])),
            )
        ),
        (
            TypeError,
            "input has dtype torch.quint8, expected one of",
            (torch.quantize_per_tensor(X, 0.1, 0, torch.quint8), W, OFF),
            {},
        ),
        *(
            (error, ORDER, args, {})
            for error, args in (
                (ValueError, (X, OFF, W)),
                (ValueError, (X, OFF, W, BIAS)),
                (TypeError, (X, OFF, W, None, 1, 0)),  # torchvision
                (TypeError, (X, OFF, W, 1, 0, 1, 1, 1)),  # mmcv
                (ValueError, (X, OFF, MASK, W, BIAS, 1, 0)),
            )
        ),
    ],
)
def test_deform_conv2d(error, message, args, options):
    with pytest.raises(error) as caught:
        conv2d(*args, **options)
    assert str(caught.value).startswith("deform_conv2d: ")
    assert message in str(caught.value)


WT = torch.zeros(6, 2, 3, 3)


@pytest.mark.parametrize(
    "error, message, args, options",
    [
        (
            ValueError,
            "input has 5 channels, expected 6 (weight.shape[0])",
            (X[:, :5], WT, None),
            {},
        ),
        (
            ValueError,
            "weight has 6 input channels, expected a multiple of groups 4",
            (X, WT, torch.zeros(1, 18, 6, 6)),
            {"groups": 4},
        ),
        (
            ValueError,
            "offset has spatial size (4, 4), expected the input's (6, 6); "
            "input [1, 6, 6, 6], weight [6, 2, 3, 3], offset [1, 18, 4, 4]",
            (X, WT, OFF),
            {},
        ),
        (
            ValueError,
            "offset has 3 groups (54 channels / 18), which do not divide the 2 output channels",
            (X, WT, torch.zeros(1, 54, 6, 6)),
            {},
        ),
        (
            ValueError,
            "output_padding is (2, 0), expected each value below the larger of stride (2, 1) and "
            "dilation (1, 1) on its axis",
            (X, WT, torch.zeros(1, 18, 6, 6)),
            {"output_padding": (2, 0), "stride": (2, 1)},
        ),
        (
            ValueError,
            "the output would have size (0, 8), expected at least 1",
            (X, WT, torch.zeros(1, 18, 6, 6)),
            {"padding": (4, 0)},
        ),
        (TypeError, "padding is 'same', expected an int or 2 ints", (X, WT), {"padding": "same"}),
        *(
            (ValueError, f"{key} is {value}, expected at most 2147483647", args, {key: value})
            for key in ("stride", "padding", "output_padding", "dilation")
            for value in (2**31, 10**30)
            for args in ((X, WT, torch.zeros(1, 18, 6, 6)), (X, WT))
        ),
        (ValueError, "expected at most 2^60 values (stride", (X, WT), {"stride": 2**31 - 1}),
        (ValueError, ORDER, (X, torch.zeros(1, 18, 6, 6), WT), {}),
        (ValueError, "bias has shape [6], expected [2]", (X, WT, None, None, torch.zeros(6)), {}),
    ],
)
def test_deform_conv_transpose2d(error, message, args, options):
    with pytest.raises(error) as caught:
        transpose2d(*args, **options)
    assert str(caught.value).startswith("deform_conv_transpose2d: ")
    assert message in str(caught.value)


aggregate2d = deformnd.deform_aggregate2d
AGGREGATED = "; input [1, 6, 6, 6], offset [1, 18, 4, 4], mask [1, 9, 4, 4]"


@pytest.mark.parametrize(
    "error, message, args, options",
    [
        (TypeError, "input is a list, expected a Tensor", ([1.0], OFF, MASK, 3), {}),
        (TypeError, "mask is a int, expected a Tensor", (X, OFF, 3, 3), {}),
        (
            TypeError,
            "kernel_size is a Parameter of shape [4, 6, 3, 3], expected an int or 2 ints",
            (X, OFF, None, torch.nn.Parameter(W)),
            {},
        ),
        (
            ValueError,
            "input has 2 dimensions, expected 4 (batch, channels, 2 spatial) or 3 (unbatched); "
            "input [6, 6], offset [1, 18, 4, 4], mask [1, 9, 4, 4]",
            (X[0, 0], OFF, MASK, 3),
            {},
        ),
        (
            ValueError,
            "offset has 4 dimensions, expected 3 as the unbatched input; input [6, 6, 6], ",
            (X[0], OFF, MASK[0], 3),
            {},
        ),
        (TypeError, "kernel_size is 3.0, expected an int or 2 ints", (X, OFF, MASK, 3.0), {}),
        (
            ValueError,
            "kernel_size is (3, 3, 3), expected an int or 2 ints",
            (X, OFF, MASK, (3, 3, 3)),
            {},
        ),
        (
            ValueError,
            "kernel_size is (3, 0), expected at least 1 on every axis" + AGGREGATED,
            (X, OFF, MASK, (3, 0)),
            {},
        ),
        (
            ValueError,
            "offset has 18 channels, expected a multiple of 50 (2 axes x 25 kernel points)"
            + AGGREGATED
            + ", kernel_size [5, 5]",
            (X, OFF, MASK, 5),
            {},
        ),
        (
            ValueError,
            "expected a multiple of 18 (2 axes x 9 kernel points) (are offset and mask swapped?)",
            (X, MASK, OFF, 3),
            {},
        ),
        (
            ValueError,
            "mask has 4 groups (36 channels / 9), which do not divide the 6 input channels",
            (X, OFF, torch.zeros(1, 36, 4, 4), 3),
            {},
        ),
        (
            ValueError,
            "offset has spatial size (4, 4), expected the output's (6, 6) (stride (1, 1), "
            "padding (1, 1), dilation (1, 1))",
            (X, OFF, MASK, 3),
            {"padding": 1},
        ),
        (ValueError, "mask has batch size 2, expected 1", (X, OFF, MASK.expand(2, 9, 4, 4), 3), {}),
        (
            ValueError,
            "the output would have size (0, 0), expected at least 1 on every axis; the dilated "
            "kernel is larger than the padded input",
            (X, OFF, MASK, 7),
            {},
        ),
        (ValueError, "stride is (0, 0), expected at least 1", (X, OFF, MASK, 3), {"stride": 0}),
        (ValueError, "padding is 'full', expected", (X, OFF, MASK, 3), {"padding": "full"}),
        (ValueError, "padding='same' expects stride 1", (X, OFF, MASK, 3, 2, "same"), {}),
        (TypeError, "input has dtype torch.int64, expected one of", (X.long(), OFF, MASK, 3), {}),
        (ValueError, "mask is on meta, expected cpu", (X, OFF, MASK.to("meta"), 3), {}),
    ],
)
def test_deform_aggregate2d(error, message, args, options):
    with pytest.raises(error) as caught:
        aggregate2d(*args, **options)
    assert str(caught.value).startswith("deform_aggregate2d: ")
    assert message in str(caught.value)


def test_a_direct_call_of_the_operator_is_checked_too():
    with pytest.raises(ValueError, match="deform_conv2d: stride is \\(1,\\), expected an int or 2"):
        torch.ops.deformnd.deform_conv(X, W, OFF, None, None, [1], [0, 0], [1, 1], 1)
    with pytest.raises(ValueError, match="deform_convNd: input has 2 dimensions"):
        torch.ops.deformnd.deform_conv(X[0, 0], W, OFF, None, None, [1], [0, 0], [1, 1], 1)
    with pytest.raises(
        ValueError, match="deform_aggregate2d: kernel_size is \\(3,\\), expected an"
    ):
        torch.ops.deformnd.deform_aggregate(X, OFF, None, [3], [1, 1], [0, 0], [1, 1])
    needs = [True] * 5
    with pytest.raises(ValueError, match="grad_output has shape \\[1, 4, 5, 4\\], expected"):
        torch.ops.deformnd.deform_conv_backward(
            torch.zeros(1, 4, 5, 4), X, W, OFF, None, [1, 1], [0, 0], [1, 1], 1, needs
        )
    with pytest.raises(TypeError, match="grad_output has dtype"):
        torch.ops.deformnd.deform_conv_backward(
            torch.zeros(1, 4, 4, 4).double(), X, W, OFF, None, [1, 1], [0, 0], [1, 1], 1, needs
        )
