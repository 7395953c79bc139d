"""The shapes of cases.py that some commands take by default, by name.  Needs neither torch nor Triton."""

# Those whose kernels are estimated, timed and tuned: the shapes with a target for their share of the roofline bound.
KERNEL_SHAPES = (
    "256x8192-highest", "256x8192-high", "2048x8192-bf16", "2048x8192-high", "6528x512-bf16", "2600000x64-bf16",
    "vicregl-128x49x512-m20-highest", "vicregl-128x49x512-m20-bf16", "vicregl-64x196x768-m20-bf16",
    "matching-64x1024x768-m20-bf16",
)  # fmt: skip
# Every shape with a target on a GPU, and fifteen more: both sides, few and many rows, several precisions, match slots.
PROOF_SHAPES = (
    *KERNEL_SHAPES,
    "vicregl-256x49x512-all-slot-high", "matching-64x1024x768-m20-highest",
    "256x2048-highest", "256x2048-bf16", "64x2048-high", "128x8192-bf16", "512x2048-high", "512x8192-highest",
    "2048x2048-bf16", "2048x2048-high", "4096x8192-bf16", "8192x256-high", "2048x64-high", "64x64-high",
    "vicregl-64x49x512-m20+4-bf16", "vicregl-64x49+9x768-m9+4-bf16", "vicregl-64x49x512-m20+4-slot-high",
)  # fmt: skip
