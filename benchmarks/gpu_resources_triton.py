"""What the Triton kernels cost on each GPU, without one: registers, spills, shared memory, vector loads, mma instructions.

    python benchmarks/gpu_resources_triton.py            renews the key "triton" of benchmarks/gpu_resources.json
    python benchmarks/gpu_resources_triton.py --check    compiles and compares, and writes nothing
    python benchmarks/gpu_resources_triton.py --hip      only says which kernels compile for gfx942

The launchers run on meta tensors with the launch itself replaced: what they would have launched, with the specialisation that
Triton would have chosen (ints of 1 and multiples of 16, pointers of PyTorch's allocator), is compiled ahead of time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TABLE = Path(__file__).resolve().parent / "gpu_resources.json"
TARGETS = (80, 87, 90, 100, 120)
META = torch.device("meta")
_TYPES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.uint8: "u8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip


@contextlib.contextmanager
def recorded_launches():
    """Within it, kernel[grid](...) only notes (kernel, arguments, options)."""
    launches: list[tuple[JITFunction, dict[str, Any], dict[str, Any]]] = []
    run = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        bound = dict(zip(self.arg_names, args)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
        assert set(bound) == set(self.arg_names), set(self.arg_names) ^ set(bound)
        launches.append((self, bound, options))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def source(kernel: JITFunction, bound: dict[str, Any]) -> ASTSource:
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = bound[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not isinstance(value, bool)):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(kernel: JITFunction, bound: dict[str, Any], options: dict[str, Any], architecture: int) -> dict[str, int]:
    compiled = triton.compile(source(kernel, bound), target=GPUTarget("cuda", architecture, 32), options=options)
    ptx = compiled.asm["ptx"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    # A stack is not yet a spill: a 64-bit division is a call, and has one. ptxas tells them apart.
    used = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    return {
        "registers": used["REG"],
        "spill_bytes": spill_bytes(ptx) if used["STACK"] or used["LOCAL"] else 0,
        "shared_bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "mma": len(re.findall(r"\b(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)", ptx)),
        "loads_16_bytes": len(re.findall(r"ld\.global[.\w:]*\.v(?:4\.[bfu]32|2\.[bfu]64)", ptx))
        + len(re.findall(r"cp\.async\.cg[^;]*, 0x10|cp\.async\.cg[^;]*\], 16", ptx)),
        "stores_16_bytes": len(re.findall(r"st\.global[.\w:]*\.v(?:4\.[bfu]32|2\.[bfu]64)", ptx)),
    }


def spill_bytes(ptx: str) -> int:
    target = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE).group(1)
    tools = ["ptxas", "ptxas-blackwell"]
    if int(re.search(r"\d+", target).group()) >= 100:
        tools.reverse()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.ptx").write_text(ptx)
        for tool in tools:  # Triton 3.9 writes PTX for sm_90a that its older ptxas does not know
            path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
            command = [path, "-v", f"--gpu-name={target}", "kernel.ptx", "-o", "kernel.cubin"]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=tool == tools[-1])
            if done.returncode == 0:
                break
    return sum(int(number) for number in re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr))


def feature_map(n, c, h, w, dtype, channels_last=False):
    x = torch.empty(n, c, h, w, dtype=dtype, device=META)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def launcher(op: str, schema: str | None = None):
    return getattr(importlib.import_module(f"segfast.triton.{op}"), schema or op)


def shuffle_cases():
    for dtype in (torch.float32, torch.float16):
        for channels_last in (False, True):
            name = f"{dtype}-{'NHWC' if channels_last else 'NCHW'}".removeprefix("torch.")
            x = feature_map(4, 116, 64, 128, dtype, channels_last)
            yield f"channel_shuffle-{name}", lambda x=x: launcher("channel_shuffle")(x, 2)
            half = feature_map(4, 58, 64, 128, dtype, channels_last)
            yield f"concat_shuffle-{name}", lambda half=half: launcher("concat_shuffle")([half, half], 2)
            backward = launcher("concat_shuffle", "concat_shuffle_backward")
            yield f"concat_shuffle_backward-{name}", lambda x=x, backward=backward: backward(x, [58, 58], 2)


def pixelwise_cases():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for classes in (19, 150, 1000):
            for channels_last in (False, True):
                if dtype == torch.float64 and classes != 19:
                    continue
                x = feature_map(2, classes, 128, 128, dtype, channels_last)
                valid = torch.empty(2, 128, 128, dtype=torch.bool, device=META)
                name = f"pixelwise_kl-{str(dtype).removeprefix('torch.')}-{classes}-{'NHWC' if channels_last else 'NCHW'}"
                yield name, lambda x=x, valid=valid: launcher("pixelwise_kl")(x, x, valid, 4.0, 1, True)
    x = feature_map(2, 19, 128, 128, torch.float32)
    yield "pixelwise_kl-float32-19-none", lambda x=x: launcher("pixelwise_kl")(x, x, None, 4.0, 0, False)


def overhaul_cases():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for channels_last in (False, True):
            x = feature_map(2, 256, 64, 128, dtype, channels_last)
            margin = torch.empty(256, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=META)
            mask = torch.empty(2, 64, 128, dtype=torch.bool, device=META)
            name = f"overhaul_loss-{str(dtype).removeprefix('torch.')}-{'NHWC' if channels_last else 'NCHW'}"
            yield name, lambda x=x, margin=margin, mask=mask: launcher("overhaul_loss")(x, x, margin, mask, 0, True)
    x, margin = feature_map(2, 256, 64, 128, torch.float32), torch.empty(256, device=META)
    yield "overhaul_loss-float32-none", lambda x=x, margin=margin: launcher("overhaul_loss")(x, x, margin, None, 1, False)


def ds_conv_cases():
    """Blocks of Fast-SCNN and of wider networks: every tile of CONFIGS, every kernel."""
    from segfast.triton import ds_conv as module

    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for tf32 in (False, True) if dtype == torch.float32 else (False,):
            for c, k, stride in ((32, 48, 2), (64, 64, 1), (128, 128, 1), (64, 192, 1)):
                if dtype == torch.float64 and (c, k) != (64, 64):
                    continue
                x = feature_map(2, c, 64, 128, dtype, True)
                oh, ow = 64 // stride, 128 // stride
                dw = torch.empty(c, 1, 3, 3, dtype=dtype, device=META)
                pw = torch.empty(k, c, 1, 1, dtype=dtype, device=META)
                wide = torch.float64 if dtype == torch.float64 else torch.float32
                one, two = ([torch.empty(size, dtype=wide, device=META) for _ in range(4)] for size in (c, k))
                options = (stride, stride), (1, 1), (1, 1), 1, 1
                y = feature_map(2, k, oh, ow, dtype, True)
                u = feature_map(2, c, oh, ow, dtype, True)
                name = f"{str(dtype).removeprefix('torch.')}{'-tf32' if tf32 else ''}-{c}-{k}-s{stride}"

                def run(schema, *arguments, how="fused", tf32=tf32):
                    kept, before = module.plan, torch.backends.cuda.matmul.allow_tf32
                    try:
                        module.plan = lambda *sizes, **layout: how
                        torch.backends.cuda.matmul.allow_tf32 = tf32
                        getattr(module, schema)(*arguments)
                    finally:
                        module.plan, torch.backends.cuda.matmul.allow_tf32 = kept, before

                inference = x, dw, None, *one, 1e-5, pw, None, *two, 1e-5, *options
                train = x, dw, None, None, None, *one[2:], 1e-5, pw, None, None, None, *two[2:], 1e-5, *options
                backward = y, x, u, y, dw, *one, 1e-5, True, pw, *two, 1e-5, True, *options, True
                yield f"ds_conv-{name}-fused", lambda run=run, a=inference: run("ds_conv", *a)
                yield f"ds_conv-{name}-two", lambda run=run, a=inference: run("ds_conv", *a, how="two kernels")
                if dtype != torch.float64 and (c, k) == (64, 64):
                    contiguous = x.contiguous(), *inference[1:]
                    for how in ("convolutions", "c++ depthwise"):
                        yield f"ds_conv-{name}-{how}", lambda run=run, a=contiguous, how=how: run("ds_conv", *a, how=how)
                yield f"ds_conv_train-{name}", lambda run=run, a=train: run("ds_conv_train", *a)
                yield f"ds_conv_backward-{name}", lambda run=run, a=backward: run("ds_conv_backward", *a)


def pairwise_cases():
    from segfast.triton import pairwise_loss as module

    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        s, t = (torch.empty(2, c, 2048, dtype=dtype, device=META) for c in (128, 256))
        few = torch.empty(2, 128, 64, dtype=dtype, device=META)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        grad = torch.empty((), dtype=wide, device=META)
        name = str(dtype).removeprefix("torch.")

        def both(s, t, gram, fast, grad=grad):
            kept = module.has_fast_float64
            module.has_fast_float64 = lambda device: fast
            try:
                _, saved = module.pairwise_loss(s, t, 1e-8, gram)
                module.pairwise_loss_backward(grad, s, t, saved, 1e-8, gram, False)
            finally:
                module.has_fast_float64 = kept

        yield f"pairwise_loss-{name}-gram", lambda s=s, t=t, both=both: both(s, t, True, True)
        yield f"pairwise_loss-{name}-direct", lambda few=few, both=both: both(few, few, False, True)
        if dtype != torch.float64:
            yield f"pairwise_loss-{name}-tiled", lambda s=s, t=t, both=both: both(s, t, True, False)
        square = torch.empty(2, 2048, 2048, dtype=dtype, device=META)
        yield f"pairwise_cosine-{name}", lambda s=s: launcher("pairwise_cosine")(s, 1e-8)
        backward = launcher("pairwise_cosine", "pairwise_cosine_backward")
        yield f"pairwise_cosine_backward-{name}", lambda s=s, square=square, backward=backward: backward(square, s, 1e-8)


def upsample_cases():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for channels_last in (False, True):
            if channels_last and dtype != torch.bfloat16:
                continue
            x, t = (feature_map(2, 19, 64 * k, 128 * k, dtype, channels_last) for k in (1, 2))
            target = torch.empty(2, 512, 1024, dtype=torch.uint8, device=META)
            weight = torch.empty(19, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=META)
            name = f"{str(dtype).removeprefix('torch.')}-{'NHWC' if channels_last else 'NCHW'}"
            heads = launcher("upsample_argmax"), launcher("upsample_cross_entropy"), launcher("upsample_pixelwise_kl")

            def argmax(x=x, run=heads[0]):
                for probability in (False, True):
                    run(x, (512, 1024), False, 1, probability)

            def cross_entropy(x=x, target=target, weight=weight, run=heads[1]):
                run(x, target, None, 255, 0.0, 0.0, 0, False, 1, True)
                run(x, target.long(), weight, 255, 0.1, 0.7, 1000, True, 1, True)

            def divergence(x=x, t=t, target=target, run=heads[2]):
                run(x, t, None, (512, 1024), 1.0, False, 1, True)
                run(x, t, target != 255, (512, 1024), 4.0, False, 1, True)

            yield f"upsample_argmax-{name}", argmax
            yield f"upsample_cross_entropy-{name}", cross_entropy
            yield f"upsample_pixelwise_kl-{name}", divergence


def one_cases():
    """Sizes of one: Triton makes them constants, which the interpreter does not."""
    from segfast.triton import ds_conv as module
    from segfast.triton import pairwise_loss as loss

    one, pair = feature_map(1, 1, 1, 1, torch.float32), feature_map(2, 1, 1, 1, torch.float32)
    node, grad = torch.empty(1, 1, 1, device=META), torch.empty((), device=META)
    vector = [torch.empty(1, device=META) for _ in range(4)]
    weight = torch.empty(1, 1, 1, 1, device=META)
    options = (1, 1), (0, 0), (1, 1), 1, 1
    train = None, None, *vector[2:], 1e-5
    nothing = None, 1, 0.0, 0.0, 0, True, 1
    yield "ones-channel_shuffle", lambda: launcher("channel_shuffle")(one, 1)
    yield "ones-concat_shuffle", lambda: launcher("concat_shuffle")([one, one], 2)
    yield "ones-overhaul_loss", lambda: launcher("overhaul_loss")(one, one, vector[0], None, 0, True)
    yield "ones-pixelwise_kl", lambda: launcher("pixelwise_kl")(one, one, None, 1.0, 1, True)
    for fast in (True, False):

        def losses(fast=fast):
            kept, loss.has_fast_float64 = loss.has_fast_float64, lambda device: fast
            try:
                for gram in (True, False):
                    loss.pairwise_loss_backward(grad, node, node, None, 1e-8, gram, False)
            finally:
                loss.has_fast_float64 = kept

        yield f"ones-pairwise_loss-{'float64' if fast else 'tiled'}", losses
    yield "ones-pairwise_cosine", lambda: launcher("pairwise_cosine", "pairwise_cosine_backward")(node, node, 1e-8)
    label = torch.empty(1, 1, 1, dtype=torch.int64, device=META)
    yield "ones-upsample_argmax", lambda: launcher("upsample_argmax")(one, (1, 1), False, 1, True)
    yield "ones-upsample_cross_entropy", lambda: launcher("upsample_cross_entropy")(one, label, *nothing, True)
    yield "ones-upsample_pixelwise_kl", lambda: launcher("upsample_pixelwise_kl")(one, one, None, (1, 1), 1.0, True, 1, True)

    def inference(how):
        kept = module.plan
        try:
            module.plan = lambda *sizes, **layout: how
            module.ds_conv(one, weight, None, *vector, 1e-5, weight, None, *vector, 1e-5, *options)
        finally:
            module.plan = kept

    for how in ("fused", "c++ depthwise"):
        yield f"ones-ds_conv-{how}", lambda how=how: inference(how)
    yield "ones-ds_conv_train", lambda: module.ds_conv_train(pair, weight, None, *train, weight, None, *train, *options)
    for batch in (True, False):
        statistics = *vector, 1e-5, batch
        backward = pair, pair, pair, pair, weight, *statistics, weight, *statistics, *options, True
        yield f"ones-ds_conv_backward-{batch}", lambda backward=backward: module.ds_conv_backward(*backward)


CASES = (
    shuffle_cases,
    pixelwise_cases,
    overhaul_cases,
    ds_conv_cases,
    pairwise_cases,
    upsample_cases,
    one_cases,
)


def launches(select: str = ""):
    """(name, kernel, arguments, options) of every kernel that a case launches; a specialisation once, under its first name."""
    seen = set()
    for cases in CASES:
        for case, call in cases():
            with recorded_launches() as recorded:
                call()
            for number, (kernel, bound, options) in enumerate(recorded):
                key = source(kernel, bound).hash(), tuple(sorted(options.items()))
                if key not in seen and re.search(select, case):
                    yield f"{case}/{number}-{kernel.__name__}", kernel, bound, options
                seen.add(key)


def triton_table(targets=TARGETS, select: str = "") -> dict[str, dict[str, dict[str, int]]]:
    """{case/kernel: {"sm_80": {registers, ...}}}"""
    return {
        name: {f"sm_{architecture}": resources(kernel, bound, options, architecture) for architecture in targets}
        for name, kernel, bound, options in launches(select)
    }


def compile_for_hip(architecture: str = "gfx942", select: str = "") -> dict[str, str]:
    """{case/kernel: "compiles" or the error}"""
    outcome = {}
    for name, kernel, bound, options in launches(select):
        try:
            triton.compile(source(kernel, bound), target=GPUTarget("hip", architecture, 64), options=options)
            outcome[name] = "compiles"
        except Exception as error:
            outcome[name] = repr(error)
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the table instead of writing it")
    parser.add_argument("--hip", action="store_true", help="compile for gfx942 only")
    parser.add_argument("--select", default="", help="a regular expression: cases to compile")
    options = parser.parse_args()
    if options.hip:
        outcome = compile_for_hip(select=options.select)
        for name, result in outcome.items():
            print(f"{name}: {result}")
        raise SystemExit(any(result != "compiles" for result in outcome.values()))
    table = triton_table(select=options.select)
    for name, targets in table.items():
        print(name, {target: (r["registers"], r["spill_bytes"], r["shared_bytes"], r["mma"]) for target, r in targets.items()})
    both = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if options.check:
        different = [name for name in table if both.get("triton", {}).get(name) != table[name]]
        raise SystemExit(f"not as in the table: {different}" if different else 0)
    both["triton"] = table if not options.select else {**both.get("triton", {}), **table}
    TABLE.write_text(json.dumps(both, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
