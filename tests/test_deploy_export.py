"""Exported files give what PyTorch gives, say what they are, and are whole or not there."""

import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import count, some
from PIL import Image
from torch import nn
from typer.testing import CliRunner

import segfast
from segfast import deploy
from segfast.cli import app
from segfast.engine import checkpoint

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

SIZE = (64, 96)


def trained(name: str, classes: int = 5, **options) -> nn.Module:
    """A network whose BatchNorms have seen images: its logits spread over the classes."""
    torch.manual_seed(0)
    model = segfast.create_model(name, classes, **options)
    with torch.no_grad():
        for _ in range(2):
            model(torch.randn(2, 3, *SIZE))
    return model.eval()


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "220", "NO_COLOR": "1", "TERM": "dumb"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A weights file as a run writes it, and a file of free size with its head inside."""
    folder = tmp_path_factory.mktemp("export")
    model = trained("espnet_c", 3, q=1)
    about = {
        "model": "espnet_c", "num_classes": 3, "options": {"q": 1}, "classes": ["road", "car", "sky"],
        "palette": [[128, 64, 128], [0, 0, 142], [70, 130, 180]],
    }  # fmt: skip
    checkpoint.save(folder / "best.safetensors", model.state_dict(), {"network": about})
    (folder / "result.json").write_text(json.dumps({"best_miou": 0.5}))
    done = deploy.export_onnx(model, folder / "free.onnx", SIZE, dynamic=True, head=True, network=about, miou=0.5)
    return folder, model, done


@pytest.mark.parametrize("name", some(segfast.list_models(), 1, 1))
def test_every_network(name, tmp_path):
    """As logits, in ONNX Runtime and OpenVINO, at two sizes; as classes in ONNX Runtime. `export_onnx` compares by itself too."""
    model = trained(name)
    sizes = [SIZE, (97, 129)]
    for head, size in zip((False, True), sizes):
        path = tmp_path / f"{size[0]}.onnx"
        done = deploy.export_onnx(model, path, size, head=head)
        assert done.refused == (), "TensorRT's parser does not take it"
        onnx.checker.check_model(path)
        images = torch.randn(1, 3, *size)
        with torch.no_grad():
            want = model(images)
        session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {"images": images.numpy()})
        agree(torch.from_numpy(got), want, head)
        try:
            import openvino
        except ImportError:
            continue
        settings = {"INFERENCE_PRECISION_HINT": "f32"}
        compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        agree(torch.from_numpy(compiled(images.numpy())[0]), want, head)


def agree(got: torch.Tensor, want: torch.Tensor, head: bool) -> None:
    if head:
        assert got.dtype == torch.uint8
        assert (got == want.argmax(1)).float().mean() >= 0.999
    else:
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_free_size(folder):
    path, model, done = folder
    artefact = deploy.load(path / "free.onnx")
    assert done.agreement >= 0.999
    for n, size in ((1, (64, 96)), (3, (65, 131)), (2, (33, 50))):
        images = torch.rand(n, 3, *size)
        with torch.no_grad():
            want = model(model.preprocessing(images * 255)).argmax(1)
        assert (artefact(images) == want).float().mean() >= 0.999


REFUSED_ONCE = ("fanet18", "icnet", "linknet", "semantic_fpn", "swiftnet_rn18", "swiftnet_rn18_pyramid")


@pytest.mark.parametrize("name", some(REFUSED_ONCE, 1, 2))
def test_free_size_of_networks_that_ask_for_their_sizes(name, tmp_path):
    """Sizes that 32 does not divide, maps smaller than their grids, and other proportions than the example's."""
    model = trained(name, 3)
    done = deploy.export_onnx(model, tmp_path / "a.onnx", SIZE, dynamic=True)
    assert set(done.refused) <= {"Mod"}  # of divisions of whole numbers; later parsers of TensorRT take it
    session = runtime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    for n, size in ((1, (97, 147)), (2, (33, 50)), (1, (193, 64)), (1, (128, 257))):
        images = torch.randn(n, 3, *size)
        with torch.no_grad():
            want = model(images)
        agree(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), want, False)


def test_metadata_and_stripping(folder):
    path, _, done = folder
    proto = onnx.load(path / "free.onnx")
    (entry,) = proto.metadata_props
    assert entry.key == "segfast"
    about = json.loads(entry.value)
    assert about["network"]["classes"] == ["road", "car", "sky"]
    assert about["network"]["palette"][1] == [0, 0, 142]
    assert about["miou"] == 0.5
    assert about["segfast"] == segfast.__version__
    assert about["preprocessing"]["divisor"] == 1.0
    assert about["made"]
    text = (path / "free.onnx").read_bytes()
    assert b"stack_trace" not in text
    assert os.fsencode(Path(segfast.__file__).parent) not in text
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)
    assert done.bytes == len(text) < done.unstripped
    assert sum(done.operators.values()) == len(proto.graph.node)
    assert [o.version for o in proto.opset_import if o.domain == ""] == [20]
    assert proto.graph.output[0].type.tensor_type.elem_type == onnx.TensorProto.UINT8


def test_fresh_process_reads_it_without_the_exporter(folder, tmp_path):
    path, _, _ = folder
    code = f"""
import sys
for name in ("onnx", "onnxscript", "torchao", "timm", "torchvision", "torchmetrics", "accelerate"):
    sys.modules[name] = None
import torch
from segfast.deploy import load
print(tuple(load({str(path / "free.onnx")!r})(torch.rand(2, 3, 40, 50)).shape))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.stdout.strip() == "(2, 40, 50)", done.stderr


def test_fixed_size_takes_other_sizes(tmp_path, folder):
    _, model, _ = folder
    deploy.export_program(model, tmp_path / "a.pt2", SIZE)
    artefact = deploy.load(tmp_path / "a.pt2")
    images = torch.rand(2, 3, 128, 192)
    small = nn.functional.interpolate(images, SIZE, mode="bilinear", antialias=True)
    with torch.no_grad():
        want = model(model.preprocessing(small * 255))
    want = nn.functional.interpolate(want, (128, 192), mode="bilinear")
    torch.testing.assert_close(artefact(images), want, rtol=0, atol=1e-3 * float(want.abs().max()))


@pytest.mark.skipif(count(0, 1) == 0, reason="AOTInductor compiles for half a minute: full effort")
def test_compiled_package(tmp_path, folder):
    _, model, _ = folder
    done = deploy.export_program(model, tmp_path / "a.pt2", SIZE, compiled=True, head=True, miou=0.25)
    assert done.agreement >= 0.999
    artefact = deploy.load(tmp_path / "a.pt2")
    assert artefact.about["miou"] == 0.25
    images = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        want = model(model.preprocessing(images * 255)).argmax(1)
    assert (artefact(images) == want).float().mean() >= 0.999


def test_executorch(folder, tmp_path):
    pytest.importorskip("executorch.runtime", reason="needs the extra executorch")
    path, model, _ = folder
    for head, size in ((True, SIZE), (False, (97, 131))):
        done = deploy.export_executorch(model, tmp_path / "a.pte", size, head=head, miou=0.25)
        assert done.agreement >= 0.999 if head else done.error <= 1e-4
        artefact = deploy.load(tmp_path / "a.pte")
        assert (artefact.about["miou"], artefact.about["size"], artefact.about["head"]) == (0.25, list(size), head)
        images = torch.rand(2, 3, *size)
        with torch.no_grad():
            want = model(model.preprocessing(images * 255))
        got = artefact(images)
        assert ((got if head else got.argmax(1)) == want.argmax(1)).float().mean() >= 0.999
    done = call("export", path, tmp_path / "b.pte", "--size", *SIZE)
    assert done.exit_code == 0, done.output
    assert "wrote" in done.output
    (tmp_path / "c.pte").write_bytes((tmp_path / "b.pte").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"c\.pte is no whole \.pte file"):
        deploy.load(tmp_path / "c.pte")


def test_executorch_missing_names_the_extra(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch", None)
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(ImportError, match=r"segfast\[executorch\]"):
        deploy.export_executorch(folder[1], tmp_path / "a.pte", SIZE)


def test_commands(folder, tmp_path, monkeypatch):
    path, model, _ = folder
    monkeypatch.setattr(sys, "argv", ["segfast", "export", "student"])
    image = np.random.default_rng(0).integers(0, 256, (70, 100, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "frame.png")
    result = call("export", path, tmp_path / "out" / "n.onnx", "--size", 70, 100)
    assert result.exit_code == 0, result.output
    assert "TensorRT's parser takes them all" in result.output
    about = deploy.load(tmp_path / "out" / "n.onnx").about
    assert about["miou"] == 0.5
    assert about["made"].endswith("export student")
    result = call("predict", "--model", tmp_path / "out" / "n.onnx", tmp_path / "frame.png", "--out", tmp_path / "predictions")
    assert result.exit_code == 0, result.output
    classes = np.asarray(Image.open(tmp_path / "predictions" / "frame.png"))
    assert (classes == model.predict(image)).mean() >= 0.999
    again = call("predict", tmp_path / "out" / "n.onnx", tmp_path / "frame.png", "--flip", "--out", tmp_path / "p")
    assert again.exit_code == 2
    assert "--no-head" in again.output
    assert call("predict", tmp_path / "frame.png").exit_code == 2
    hub = model.save_pretrained(tmp_path / "hub", miou=0.25)
    assert call("export", hub, tmp_path / "hub.onnx", "--size", 70, 100).exit_code == 0
    assert deploy.load(tmp_path / "hub.onnx").about["miou"] == 0.25
    result = call("predict", hub, tmp_path / "frame.png", "--out", tmp_path / "q")
    assert result.exit_code == 0, result.output


class Looks(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Decomposes(nn.Module):
    def forward(self, x):
        return x + torch.linalg.eigvals(x[0, 0, :4, :4]).real.sum()


@pytest.mark.parametrize("layer", [Looks(), Decomposes()])
def test_what_cannot_be_exported_names_the_layer(layer, tmp_path):
    model = trained("fast_scnn", 3, width=0.25)
    model.classifier.conv[0] = layer
    with pytest.raises(ValueError, match=r"classifier\.conv\.0.*want|classifier\.conv\.0.*Want"):
        deploy.export_onnx(model, tmp_path / "a.onnx", SIZE)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_quantised_names_the_layer():
    pytest.importorskip("torchao")
    model = trained("fast_scnn", 3, width=0.25)
    model.classifier.conv[0] = Looks()
    with pytest.raises(ValueError, match=r"quantize: cannot export the layer 'classifier\.conv\.0'.*replace the layer"):
        deploy.quantize(model, list(torch.randn(8, 3, *SIZE)))


def test_what_onnx_lacks_in_int8_names_the_place(tmp_path, monkeypatch):
    """The head's own operator, replaced by one that ONNX has not, outside of any layer."""
    pytest.importorskip("torchao")
    model = trained("fast_scnn", 3, width=0.25)
    quantized = deploy.quantize(model, list(torch.randn(8, 3, *SIZE)), observer="min-max")
    monkeypatch.setattr(deploy.export, "to_classes", lambda logits, *_: torch.linalg.eigvals(logits[0, 0, :4, :4]).real)
    with pytest.raises(ValueError, match=r"quantize_onnx: ONNX has no \S*eig\S* as the network itself .*\.py:\d+\)"):
        deploy.quantize_onnx(quantized, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_is_not_written(tmp_path, monkeypatch):
    """The comparison with PyTorch decides: a network that changes after it was traced stands for a wrong translation."""
    from segfast.deploy import export

    model = trained("fast_scnn", 3, width=0.25)
    program = export._program

    def late(*arguments):
        traced = program(*arguments)
        model.classifier.conv[1] = nn.Conv2d(32, 3, 1)
        return traced

    monkeypatch.setattr(export, "_program", late)
    with pytest.raises(ValueError, match="other numbers once exported"):
        deploy.export_program(model, tmp_path / "a.pt2", SIZE)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(tmp_path, monkeypatch):
    model = trained("fast_scnn", 3, width=0.25)

    def stopped(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        deploy.export_program(model, tmp_path / "a.pt2", SIZE)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_while_it_is_written_leaves_nothing(tmp_path):
    """Before it is whole a file has no name."""
    code = (
        "import os, signal, sys; from segfast._files import write\n"
        "os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write(sys.argv[1], bytes(100_000))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.onnx")])
    assert done.returncode == -9
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_WRONLY))
    except (AttributeError, OSError):
        pytest.skip("no files without names here")
    assert list(tmp_path.iterdir()) == []


def test_where_files_have_names_from_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    for content in (b"old", b"new"):
        assert checkpoint.write(tmp_path / "a", content).read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_the_place_is_tried_first(tmp_path, folder):
    _, model, _ = folder
    (tmp_path / "a.onnx").mkdir()
    (tmp_path / "file").touch()
    for path in (tmp_path / "a.onnx", tmp_path / "file" / "b.onnx"):
        with pytest.raises(OSError, match=f"cannot write {path}"):
            deploy.export_onnx(model, path, SIZE)


def test_bad_arguments(tmp_path, folder):
    path, model, _ = folder
    with pytest.raises(ValueError, match=r"ends in \.onnx"):
        deploy.export_onnx(model, tmp_path / "a.pt2", SIZE)
    with pytest.raises(ValueError, match="opset from 18"):
        deploy.export_onnx(model, tmp_path / "a.onnx", SIZE, opset=11)
    with pytest.raises(ValueError, match="at least 32 for espnet_c"):
        deploy.export_onnx(model, tmp_path / "a.onnx", (2, 2))
    with pytest.raises(RuntimeError, match="evaluation mode"):
        deploy.export_onnx(segfast.create_model("fast_scnn"), tmp_path / "a.onnx", SIZE)
    with pytest.raises(FileNotFoundError):
        deploy.load(tmp_path / "none.onnx")
    for name, content in (("a.onnx", (path / "free.onnx").read_bytes()[:5000]), ("a.pt2", b"PK"), ("a.txt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*(whole|ends in)"):
            deploy.load(tmp_path / name)
    whole = deploy.export_program(model, tmp_path / "c.pt2", SIZE).path.read_bytes()
    assert str(Path(segfast.__file__).parent).encode() not in whole, "the source's paths stay here"
    for lost, why in (("segfast.json", "does not say"), ("models", "is no whole")):
        with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(tmp_path / "c.pt2", "w") as new:
            for name in old.namelist():
                if lost not in name:
                    new.writestr(name, old.read(name))
        with pytest.raises(ValueError, match=rf"c\.pt2 {why}"):
            deploy.load(tmp_path / "c.pt2")
    artefact = deploy.load(path / "free.onnx")
    with pytest.raises(ValueError, match=r"free\.onnx does not run on an image of 0x3 \(networks want at least 32"):
        artefact(torch.rand(1, 3, 0, 3))
    other = onnx.load(path / "free.onnx")
    del other.metadata_props[:]
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match="does not say what network"):
        deploy.load(tmp_path / "other.onnx")


def test_missing_package_names_the_extra(tmp_path, monkeypatch, folder):
    _, model, _ = folder
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"segfast\[deploy\]"):
        deploy.export_onnx(model, tmp_path / "a.onnx", SIZE)


def test_weights_that_are_not_finite(tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = segfast.create_model("fast_scnn", 3, width=0.25).eval()
    with torch.no_grad():
        next(model.parameters())[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"want finite weights, got NaN or infinities in .*weight"):
        deploy.export_onnx(model, tmp_path / "a.onnx", (64, 96))
    with pytest.raises(ValueError, match=r"want an opset from 18 to 25"):
        deploy.export_onnx(model, tmp_path / "a.onnx", (64, 96), opset=99)
    assert not list(tmp_path.iterdir())
