"""A candidate for the product's decode kernel: codes stored as tensor-core fragments.  Not part of the package.

**What it is.**  The product's kernel (``mixcomp.kernels``) reads codes as they are stored and orders them in registers.
This one reads them in the order in which the threads of a tensor-core instruction hold them (``fragments``, made once from
the stored bytes), so three instructions turn a pair of codes into operands (``operand``) and one batched dot serves all
widths (``gemm``); where a site has few tiles, programs share its columns (``tiles``).

**What is known.**  It is exact under Triton's interpreter (tests/test_fragment_kernel.py) for fp16 and fp32, and compiles
for sm_90.  It has NOT been timed on a GPU, nor have bf16, the inline assembly or overlapping launches been tried on one:
nothing says yet that it is faster, and the numbers in ``tiles`` are guesses.

**How to run it.**  On a machine with an H100, from the repository's root (meant to end within 10 minutes, which has not
been tried; without ``--sweep`` it is shorter)::

    make build/typecheck && PYTHONUNBUFFERED=1 PYTHONPATH=build/typecheck \\
        python3 benchmarks/kernel_times.py --sweep --out kernel_times.json

**What the run answers.**  Is every tile exact on the device, in fp16, bf16 and fp32?  Which tile and split is the fastest
for each shape and number of tokens?  How do the linears of a Llama-3.1-8B layer then compare with the product's kernel,
cuBLAS and tinygemm at 1 to 256 tokens, and with the time of reading the bytes?  Does overlapping launches help?  What does
an eager call cost the processor?

**What would make it the product's kernel**, if the run says that it is faster:

- Memory: ``MixedLinear`` would hold fragments instead of the stored codes and scales on a GPU (``fragments.unpack`` leads
  back when a model is saved), not both; a form cached beside the codes doubles a model.
- Tiles: ``tiles.SMALL`` and ``LARGE`` from the table that ``--sweep`` prints.
- Launch cost: counters, partial sums and the tile table are looked up at every call; at one token an eager call may cost
  more than the kernel.  Overlap is safe only where nothing but the activations changes between launches.
- More than 64 tokens: the batched dot was made for few; the product's kernel, or expanding the weight once and cuBLAS, may
  stay ahead there, and then needs the stored codes or a reader of fragments.
- Formats: what ``SiteFormat.departure`` names stays with the reference path, as now.
"""
