"""Networks as folders, offline."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import some

import segfast
from segfast._files import write
from segfast.models import SegmentationModel, _hub

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", some(segfast.list_models(), 4, 2))
def test_round_trip(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    model = segfast.create_model(name, 5).eval()
    model.save_pretrained(tmp_path / "folder", miou=0.25)
    again = SegmentationModel.from_pretrained(tmp_path / "folder")
    assert type(again) is type(model)
    assert not again.training
    for key, x in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], x)
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "mean IoU: 0.2500" in card
    assert segfast.models.NETWORKS[name].paper in card
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_options_and_backbones_come_back(tmp_path):
    for i, (name, options) in enumerate((("fast_scnn", {"width": 0.25}), ("linknet", {"backbone": "shufflenetv2_x0_5"}))):
        model = segfast.create_model(name, 3, **options).eval()
        model.save_pretrained(tmp_path / str(i))
        images = torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            assert torch.equal(SegmentationModel.from_pretrained(tmp_path / str(i))(images), model(images))


def test_errors(tmp_path, monkeypatch):
    model = segfast.create_model("fast_scnn", 3, width=0.25)
    with pytest.raises(ValueError, match="got other tensors"):
        model.save_pretrained(tmp_path / "a", network={"model": "fast_scnn", "num_classes": 3})
    assert not (tmp_path / "a").exists()
    model.save_pretrained(tmp_path / "a")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"segfast\[hub\]"):
        SegmentationModel.from_pretrained("nobody/nothing")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["network"]["num_classes"] = 4
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="does not fit fast_scnn"):
        SegmentationModel.from_pretrained(tmp_path / "a")
    weights = tmp_path / "a" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="is not what save_pretrained wrote"):
        SegmentationModel.from_pretrained(tmp_path / "a")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        SegmentationModel.from_pretrained(tmp_path / "a")


def test_hubconf(tmp_path):
    spec = importlib.util.spec_from_file_location("hubconf", ROOT / "hubconf.py")
    hub = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hub)
    for name in segfast.list_models():
        assert callable(getattr(hub, name))
    model = hub.fast_scnn(num_classes=3, width=0.25)
    model.save_pretrained(tmp_path)
    assert torch.equal(hub.pretrained(str(tmp_path)).classifier.conv[1].weight, model.classifier.conv[1].weight)
    assert torch.hub.load(str(ROOT), "espnet_c", source="local", num_classes=3).num_classes == 3


def test_preprocessing_comes_back(tmp_path):
    model = segfast.create_model("fast_scnn", 3, width=0.25).eval()
    model.preprocessing = segfast.models.Preprocessing((0.0, 0.0, 0.0), (1.0, 1.0, 2.0), 1.0, True)
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path).preprocessing == model.preprocessing
    config = json.loads((tmp_path / "config.json").read_text())
    config["preprocessing"]["gamma"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"config\.json says of preprocessing"):
        type(model).from_pretrained(tmp_path)


def test_a_folder_survives_a_full_disk(tmp_path, monkeypatch):
    model = segfast.create_model("fast_scnn", 3, width=0.25).eval()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def small(path, content):
        if len(content) > 4096:
            raise OSError(28, f"cannot write {path}: No space left on device")
        return write(path, content)

    monkeypatch.setattr(_hub, "write", small)
    with pytest.raises(OSError, match="No space left"):
        segfast.create_model("fast_scnn", 5, width=0.25).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
