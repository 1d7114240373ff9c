"""Put DSConv in the place of the depthwise-separable runs of a network, and take it out again."""

from __future__ import annotations

from collections import Counter

from torch import nn

from segfast.nn.ds_conv import ACTIVATIONS, DSConv, fuses

_ORIGINAL = "_segfast_original"  # in a changed module's __dict__: by a block's name, the children whose place it took


def convert(model: nn.Module) -> list[str]:
    """Put DSConv in the place of every depthwise, BatchNorm, activation, pointwise, BatchNorm, activation run, in place.

    Found are runs within an `nn.Sequential`, also through Sequential modules nested in it (torchvision's `Conv2dNormActivation`);
    blocks named `_DSConv` whose only child is such a run; and timm's `DepthwiseSeparableConv`. Either activation may be
    missing. The layers are the same objects, parameters and buffers with them, so optimisers keep working and the model may
    be trained on. Left alone is whatever has hooks, stands in several places, or is of a class that may compute another thing.

    The state_dict keys of a converted run change (`3.weight` becomes `3.conv.0.weight`), but for `_DSConv`, whose keys are
    those of DSConv: load checkpoints before, and save after `unconvert`.

    Args:
        model: changed in place.

    Returns:
        The names of the new DSConv modules; an empty list if nothing is left to convert.
    """
    uses = Counter(id(child) for module in model.modules() for child in module._modules.values())
    changed: list[str] = []
    seen: set[int] = set()

    def apply(parent: nn.Module, prefix: str, runs: list) -> None:
        for names, block, rest in runs:
            parent.__dict__.setdefault(_ORIGINAL, {})[names[0]] = {name: parent._modules[name] for name in names}
            parent._modules[names[0]] = block
            for name in names[1:]:
                if rest is None:
                    del parent._modules[name]
                else:
                    parent._modules[name] = rest()
            changed.append(f"{prefix}{names[0]}")

    def visit(parent: nn.Module, prefix: str) -> None:
        if id(parent) in seen or isinstance(parent, DSConv):
            return
        seen.add(id(parent))
        apply(parent, prefix, _seed_runs(parent, uses))
        if type(parent).forward is nn.Sequential.forward and "forward" not in parent.__dict__:
            apply(parent, prefix, _sequential_runs(parent, uses))
        elif type(parent).__name__ == "DepthwiseSeparableConv" and type(parent).__module__.startswith("timm."):
            apply(parent, prefix, _timm_runs(parent, uses))
        for name, child in parent._modules.items():
            if child is not None:
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return changed


def unconvert(model: nn.Module) -> nn.Module:
    """Undo `convert`: the layers stand again where they stood, with what they learned since; other changes since then stay.

    Args:
        model: changed in place.

    Returns:
        The model.
    """
    for module in list(model.modules()):
        original = module.__dict__.pop(_ORIGINAL, None)
        if original is None:
            continue
        now, restored = dict(module._modules), {}
        for name, child in now.items():
            if name in original and isinstance(child, DSConv):
                _refresh(child, original[name])
                restored.update(original[name])
            elif name not in restored:
                restored[name] = child
            elif type(child) is not nn.Identity:  # added since, under a name that was free then
                restored[str(len(restored))] = child
        module._modules.clear()
        module._modules.update(restored)
    return model


def _refresh(block: DSConv, children: dict[str, nn.Module]) -> None:
    """Give the layers that a block stands for its mode, and put what took a layer's place in the block into the layer's place."""
    for before, after in block.__dict__.get("_stands_for", ()):
        before.training = after.training
    changed = {id(old): new for old, new in zip(block.__dict__.get("_layers", ()), block.conv) if old is not new}
    for parent in (children, *(part._modules for child in children.values() for part in child.modules())):
        for name, child in parent.items():
            parent[name] = changed.get(id(child), child)


def _block(layers: list[nn.Module], around: list[nn.Module]) -> DSConv | None:
    # layers: dw, bn, act, pw, bn, act with None for no activation; around: the modules that the block makes superfluous
    if any(_hooked(m) for m in (*layers, *around) if m is not None):
        return None
    plain = [_plain(m) for m in layers]
    if not fuses(nn.Sequential(*plain)) or any(type(plain[i]) is not nn.BatchNorm2d for i in (1, 4)):
        return None
    block = DSConv.__new__(DSConv)
    nn.Module.__init__(block)
    block.conv = nn.Sequential(*plain)
    block.training = block.conv.training = plain[0].training
    block.__dict__["_layers"] = plain
    block.__dict__["_stands_for"] = [
        *((a, b) for a, b in zip(layers, plain) if a is not None and a is not b),
        *((module, block) for module in around),
    ]
    return block


def _plain(layer: nn.Module | None) -> nn.Module:
    if layer is None:
        return nn.Identity()
    if type(layer).__name__ != "BatchNormAct2d":
        return layer
    bn = nn.BatchNorm2d.__new__(nn.BatchNorm2d)
    bn.__dict__.update({name: value for name, value in layer.__dict__.items() if name != "_modules"})
    bn.__dict__["_modules"] = {}  # parameters and buffers are shared by the dictionary: neither can lose the other
    return bn


def _hooked(module: nn.Module) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


def _sequential_runs(parent: nn.Sequential, uses: Counter) -> list:
    # [(name of the child, its module, layer)]: the layers in the order of running
    flat = [(name, child, layer) for name, child in parent._modules.items() for layer in _layers(child)]
    starts = [i for i, entry in enumerate(flat) if i == 0 or flat[i - 1][0] != entry[0]]
    runs, end = [], 0
    for i in starts:
        if i < end:
            continue
        layers, j = [], i
        for kind in (nn.Conv2d, nn.BatchNorm2d, None, nn.Conv2d, nn.BatchNorm2d, None):
            layer = flat[j][2] if j < len(flat) else None
            if type(layer) is kind or (kind is None and type(layer) in ACTIVATIONS):
                layers.append(layer)
                j += 1
            elif kind is None:
                layers.append(None)
            else:
                break
        if len(layers) < 6 or (j < len(flat) and j not in starts):
            continue
        names = list(dict.fromkeys(name for name, _, _ in flat[i:j]))
        around = [m for name in names for m in parent._modules[name].modules() if m._modules]
        once = all(uses[id(m)] == 1 for name in names for m in parent._modules[name].modules())
        block = _block(layers, around) if once else None
        if block is not None:
            runs.append((names, block, None))
            end = j
    return runs


def _layers(module: nn.Module | None) -> list:
    if type(module).__dict__.get("forward", getattr(type(module), "forward", None)) is nn.Sequential.forward and module._modules:
        return [layer for child in module._modules.values() for layer in _layers(child)]
    return [module]


def _timm_runs(parent: nn.Module, uses: Counter) -> list:
    names = ["conv_dw", "bn1", "aa", "se", "conv_pw", "bn2"]
    dw, bn1, aa, se, pw, bn2 = (parent._modules.get(name) for name in names)
    norms = [bn for bn in (bn1, bn2) if type(bn).__name__ == "BatchNormAct2d" and type(bn.drop) is nn.Identity]
    if len(norms) < 2 or type(aa) is not nn.Identity or type(se) is not nn.Identity:
        return []
    inner = [aa, se, *(m for bn in norms for m in (bn.drop, bn.act))]
    if any(_hooked(m) for m in inner) or any(uses[id(m)] != 1 for m in (dw, bn1, pw, bn2, *inner)):
        return []
    block = _block([dw, bn1, bn1.act, pw, bn2, bn2.act], [aa, se, bn1.drop, bn2.drop])
    return [] if block is None else [(names, block, nn.Identity)]


class _SeedsBlock:
    def forward(self, x):
        return self.conv(x)


def _runs_conv_alone(block: nn.Module) -> bool:
    """Whether its forward is the seed's, by its code."""
    code, seeds = (getattr(forward, "__code__", None) for forward in (type(block).forward, _SeedsBlock.forward))
    return code is not None and (code.co_code, code.co_names) == (seeds.co_code, seeds.co_names)


def _seed_runs(parent: nn.Module, uses: Counter) -> list:
    runs = []
    for name, child in parent._modules.items():
        named = type(child).__name__ == "_DSConv" and list(child._modules) == ["conv"]
        if named and _runs_conv_alone(child) and type(child.conv) is nn.Sequential:
            whole = [child, child.conv, *child.conv]
            if len(child.conv) == 6 and all(uses[id(m)] == 1 for m in whole):
                block = _block(list(child.conv), whole[:2])
                if block is not None:
                    runs.append(([name], block, None))
    return runs
