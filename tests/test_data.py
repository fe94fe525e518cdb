"""data.py: labels, texts, photos, VOC2007 on real files, features, CLIP, the cache; and what it says of bad input."""
import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import scenes
from data import UsageError


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# --- labels and texts -------------------------------------------------------------------------------------------------

def test_labels(tmp_path):
    assert data.read_labels(write(tmp_path / "ok.txt", "\ufeffdog\n\n  fire truck \r\nnaïve café\n")) == ["dog", "fire truck", "naïve café"]
    for content, message in (("", "holds no label"), ("\n \n", "holds no label"), ("dog\ncat\nDog\n", "'Dog' stands twice .entries 1 and 3"), ("a\x07b\n", "not a label name"), ("x" * 201, "201 characters")):
        with pytest.raises(UsageError, match=message):
            data.read_labels(write(tmp_path / "bad.txt", content))
    with pytest.raises(UsageError, match="no such file"):
        data.read_labels(tmp_path / "none.txt")
    with pytest.raises(UsageError, match="is a folder"):
        data.read_labels(tmp_path)
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(UsageError, match="UTF-8"):
        data.read_labels(tmp_path / "latin.txt")


def test_texts(tmp_path, capsys):
    lines = ['{"text": "a dog and a cat", "labels": ["cat", "dog"]}', "", '{"text": "nothing", "labels": []}', '{"text": "a cat", "labels": ["cat"]}']
    for path in (write(tmp_path / "t.jsonl", "\n".join(lines)), tmp_path / "t.jsonl.gz"):
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress("\n".join(lines).encode()))
        texts, labels = data.read_texts(path, ["dog", "cat"])
        assert texts == ["a dog and a cat", "a cat"] and labels.tolist() == [[1, 1], [0, 1]]
        assert "1 texts without labels skipped (first: line 3)" in capsys.readouterr().err
    for content, message in (('{"text": "a", "labels": ["dgo"]}', "line 1: label 'dgo' is not in the label list .did you mean dog"), ("{", "line 1: not valid JSON"), ('["a"]', "line 1: must be"),
                             ('{"text": "a"}', "line 1: must be"), ("", "no usable text"), ('{"text": "a", "labels": []}', "no usable text")):
        with pytest.raises(UsageError, match=message):
            data.read_texts(write(tmp_path / "bad.jsonl", content), ["dog", "cat"])
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b"x" * 1000)[:15])
    with pytest.raises(UsageError, match="cannot be read"):
        data.read_texts(tmp_path / "torn.jsonl.gz", ["dog"])


def test_match_nouns():
    names = ["dog", "person", "dining table", "bus", "knife", "puppy"]
    synonyms = {"": ["hot dog"], "person": ["man", "men"], "dining table": ["table"]}
    table = {"Two dogs.": "dog", "A hot dog on a table": "dining table", "a hotdog": "", "MEN and buses": "person bus", "a manly dogma": "", "knives!": "knife", "puppies": "puppy",
             "a dining-table": "dining table", "the dog's bone": "dog", "dining  tables": "dining table"}
    labels = data.match_nouns(list(table), names, synonyms)
    for row, expected in zip(labels, table.values()):
        assert {names[c] for c in row.nonzero()[0]} == {name for name in names if name in expected}, (expected, row)


def test_match_nouns_agrees_with_the_grammar():
    """The scenes grammar knows which things it named: an outside oracle for the matcher."""
    texts, labels = scenes.sentences(500, 1)
    np.testing.assert_array_equal(data.match_nouns(texts, scenes.NAMES, data.synonyms_of(scenes.NAMES, "scenes")), labels)


def test_captions(tmp_path, shared):
    texts, labels = data.read_captions(shared / "captions_val2017.json", data.VOC_NAMES, data.synonyms_of(data.VOC_NAMES, "voc2007"))
    assert 14000 < len(texts) < 18500 and labels.any(1).all() and (labels.sum(0) > 50).all()
    with np.load(shared / "photo_embeddings" / "voc2007_even.npz") as stored:  # labels made by someone else's matcher
        theirs = stored["text_labels"].sum(0)
    assert np.corrcoef(theirs, labels.sum(0))[0, 1] > 0.99
    plain = write(tmp_path / "captions.txt", "a dog\nnothing here\ntwo cats and a bike\n")
    texts, labels = data.read_captions(plain, ["dog", "cat"])
    assert texts == ["a dog", "two cats and a bike"] and labels.tolist() == [[1, 0], [0, 1]]
    with pytest.raises(UsageError, match="none of its 3 captions"):
        data.read_captions(plain, ["zebra"])
    with pytest.raises(UsageError, match="not COCO"):
        data.read_captions(write(tmp_path / "x.json", "[1]"), ["dog"])


def test_template_texts():
    names = ["dog", "apple", "fire truck"]
    texts, labels = data.template_texts(names, 300, 0)
    assert (texts, labels.tolist()) == (lambda t, l: (t, l.tolist()))(*data.template_texts(names, 300, 0))
    np.testing.assert_array_equal(data.match_nouns(texts, names), labels)
    assert labels.any(1).all() and labels.sum(0).min() > 100 and any("an apple" in text for text in texts)
    assert data.template_texts(["only"], 5, 0)[1].tolist() == [[1]] * 5


# --- datasets and photos ----------------------------------------------------------------------------------------------

def test_voc2007_on_real_files(shared):
    """Counts taken from the XML by another way: text search."""
    ids = (shared / "VOCdevkit/VOC2007/ImageSets/Main/test.txt").read_text().split()
    policies = {policy: data.voc2007(shared, "test", policy) for policy in ("ignore", "negative", "positive")}
    for name, column in (("person", 14), ("dining table", 10), ("car", 6)):
        easy, any_object = 0, 0
        for image_id in ids:
            blocks = (shared / f"VOCdevkit/VOC2007/Annotations/{image_id}.xml").read_text().split("<object>")[1:]
            mine = [block for block in blocks if f"<name>{name.replace(' ', '')}</name>" in block]
            any_object += bool(mine)
            easy += any("<difficult>0</difficult>" in block for block in mine)
        assert [(policies[p].labels[:, column] == 1).sum() for p in ("ignore", "negative", "positive")] == [easy, easy, any_object]
        assert (policies["ignore"].labels[:, column] == -1).sum() == any_object - easy
    assert len(ids) == 150 and policies["ignore"].policy == "difficult=ignore" and all(photo.is_file() for photo in policies["ignore"].photos)
    assert len(data.load_photos("voc2007", shared, "train", limit=7).photos) == 7


def test_voc2007_small_and_broken(tmp_path):
    base = tmp_path / "VOCdevkit" / "VOC2007"
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (base / folder).mkdir(parents=True)
    write(base / "ImageSets/Main/test.txt", "000001\n")
    Image.new("RGB", (8, 8)).save(base / "JPEGImages/000001.jpg")
    thing = "<object><name>{}</name><difficult>{}</difficult></object>"
    write(base / "Annotations/000001.xml", f"<annotation>{thing.format('dog', 1)}{thing.format('dog', 0)}{thing.format('cat', 1)}{thing.format('cat', 1)}</annotation>")
    for policy, cat in (("ignore", -1), ("negative", 0), ("positive", 1)):
        labels = data.voc2007(tmp_path, "test", policy).labels[0]
        assert labels[11] == 1 and labels[7] == cat and np.abs(labels).sum() == 1 + abs(cat)
    write(base / "Annotations/000001.xml", thing.format("unicorn", 0).join(("<a>", "</a>")))
    with pytest.raises(UsageError, match="unicorn"):
        data.voc2007(tmp_path, "test")
    write(base / "Annotations/000001.xml", "<annotation>")
    with pytest.raises(UsageError, match="000001.xml cannot be read"):
        data.voc2007(tmp_path, "test")
    with pytest.raises(UsageError, match="VOCdevkit/VOC2007/{JPEGImages"):
        data.load_photos("voc2007", tmp_path / "elsewhere", "test")
    with pytest.raises(UsageError, match="trainval.txt: no such file"):
        data.voc2007(tmp_path, "trainval")


def test_download_failure_is_one_line(tmp_path, monkeypatch):
    data.import_open_clip()
    import torchvision.datasets

    def refuse(root, year, image_set, download):
        assert (root, year, image_set, download) == (str(tmp_path), "2007", "trainval", True)
        raise RuntimeError("File not found or corrupted.")
    monkeypatch.setattr(torchvision.datasets, "VOCDetection", refuse)
    with pytest.raises(UsageError, match="download failed .File not found or corrupted.*by hand"):
        data.load_photos("voc2007", tmp_path, "test", download=True)


def test_photos(tmp_path, cache, capsys):
    clip = data.load_clip()
    (tmp_path / "deep").mkdir()
    picture = scenes.picture("test", 0)[0]
    picture.save(tmp_path / "b.png")
    picture.convert("L").save(tmp_path / "a.jpg")
    picture.convert("CMYK").save(tmp_path / "deep" / "c.jpeg")
    picture.save(tmp_path / ".hidden.png")
    picture.save(tmp_path / "whole.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    (tmp_path / "empty.png").write_bytes(b"")
    write(tmp_path / "notes.txt", "no photo")
    photos = data.list_photos(tmp_path)
    assert [photo.name for photo in photos] == ["a.jpg", "b.png", "c.jpeg", "empty.png", "torn.jpg", "whole.jpg"]
    for _ in range(2):  # computed, then from the cache
        embeddings, kept = data.embed_photos(clip, photos, cache)
        assert embeddings.shape == (4, 96) and kept.tolist() == [0, 1, 2, 5]
        said = capsys.readouterr().err
        assert "2 of 6 photos could not be read and were skipped" in said and "torn.jpg" in said and "empty.png" in said
    with pytest.raises(UsageError, match="no photo could be read"):
        data.embed_photos(clip, [tmp_path / "torn.jpg"], cache)
    with pytest.raises(UsageError, match="no such file or folder"):
        data.list_photos(tmp_path / "nowhere")
    (tmp_path / "none").mkdir()
    with pytest.raises(UsageError, match="no photo in this folder"):
        data.list_photos(tmp_path / "none")


def test_photo_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # as a phone held upright writes it
    Image.new("RGB", (40, 20)).save(tmp_path / "phone.jpg", exif=exif)
    assert data.open_photo(tmp_path / "phone.jpg").size == (20, 40)


def test_features(tmp_path):
    good = {"text_embeddings": np.zeros((5, 4), np.float16), "text_labels": np.ones((5, 2), np.int8), "image_embeddings": np.zeros((3, 4), np.float32), "image_labels": np.zeros((3, 2), np.int8),
            "label_names": np.array(["a", "b"]), "label_embeddings": np.ones((2, 4))}
    path = tmp_path / "f.npz"
    np.savez(path, **good)
    loaded = data.load_features(path)
    assert loaded["label_names"] == ["a", "b"] and loaded["text_embeddings"].dtype == np.float32
    nan = good["image_embeddings"].copy()
    nan[1, 1] = np.nan
    for change, message in (({"text_labels": np.ones((4, 2), np.int8)}, r"text_labels has shape \[4, 2\], expected \[5, 2\]"), ({"label_embeddings": np.ones((2, 3))}, "label_embeddings has shape"),
                            ({"image_embeddings": nan}, "image_embeddings holds values that are not finite"), ({"image_labels": np.full((3, 2), 2)}, "image_labels must hold 1"),
                            ({"label_names": np.array(["a", "A"])}, "stands twice"), ({"label_names": np.array([{}, 1], dtype=object)}, "not a readable .npz"), ({"text_embeddings": np.zeros((0, 4))}, "text_")):
        np.savez(path, **{**good, **change})
        with pytest.raises(UsageError, match=message):
            data.load_features(path)
    np.savez(path, **{k: v for k, v in good.items() if k != "image_labels"})
    with pytest.raises(UsageError, match="lacks image_labels"):
        data.load_features(path)
    path.write_bytes(b"PK nonsense")
    with pytest.raises(UsageError, match="not a readable .npz"):
        data.load_features(path)
    with pytest.raises(UsageError, match="no such file"):
        data.load_features(tmp_path / "none.npz")


# --- CLIP and the cache -----------------------------------------------------------------------------------------------

def test_clip_refusals(tmp_path, monkeypatch):
    for backbone, message in (("ViT-B-61", "unknown; did you mean ViT-B-16"), ("scene", "did you mean scenes"), ("ViT-B-16-SigLIP", "not supported"), ("roberta-ViT-B-32", "not supported"),
                              ("convnext_base", "not supported"), ("coca_ViT-B-32", "not supported")):
        with pytest.raises(UsageError, match=message):
            data.load_clip(backbone)
    with pytest.raises(UsageError, match="neither a file nor weights.*laion2b"):
        data.load_clip("ViT-B-32", "laion")
    with pytest.raises(UsageError, match="multiple of 32, the patch size"):
        data.load_clip("ViT-B-32", "none", resolution=225)
    write(tmp_path / "w.pt", "not weights")
    with pytest.raises(UsageError, match="do not load into ViT-B-32"):
        data.load_clip("ViT-B-32", str(tmp_path / "w.pt"))
    with pytest.raises(UsageError, match="scenes checkpoint.*cannot be read"):
        data.load_clip("scenes", str(tmp_path / "w.pt"))


def test_no_network_for_weights(tmp_path, monkeypatch):
    """Says at once which file to get and where to put it; a file put there is found."""
    def refuse(*_, **__):
        raise OSError("Name or service not known")
    monkeypatch.setattr(data.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(data, "WEIGHTS", tmp_path)
    import huggingface_hub
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(UsageError) as caught:
        data.load_clip("ViT-B-32", "openai")
    assert "open_clip_model.safetensors" in str(caught.value) and str(tmp_path / "ViT-B-32.openai.safetensors") in str(caught.value) and "\n" not in str(caught.value)
    write(tmp_path / "ViT-B-32.openai.safetensors", "x")
    with pytest.raises(UsageError, match="do not load"):
        data.load_clip("ViT-B-32", "openai")


@pytest.mark.parametrize("backbone", ["ViT-B-32", "RN50"])
def test_random_weights_run_and_repeat(backbone, cache):
    clip = data.load_clip(backbone, "none")
    embeddings, _ = data.embed_photos(clip, [("test", 0), ("test", 1)], cache)
    assert embeddings.shape == (2, {"ViT-B-32": 512, "RN50": 1024}[backbone]) and embeddings.isfinite().all()
    assert clip.key == data.load_clip(backbone, "none").key


def test_weights_from_a_file(tmp_path):
    """open_clip's own state dict, saved, is loaded back and has the same identity but for nothing."""
    from safetensors.torch import save_file
    clip = data.load_clip("ViT-B-32", "none")
    save_file({name: tensor.contiguous() for name, tensor in clip.model.state_dict().items()}, str(tmp_path / "w.safetensors"))
    assert data.load_clip("ViT-B-32", str(tmp_path / "w.safetensors")).key == clip.key


def test_text_embeddings_equal_open_clip(cache):
    clip = data.load_clip("ViT-B-32", "none")
    texts = ["a photo of a dog.", "two cats"]
    expected = clip.model.encode_text(data.import_open_clip().get_tokenizer("ViT-B-32")(texts))
    torch.testing.assert_close(data.embed_texts(clip, texts, cache), expected)


def test_unknown_words_and_long_texts_are_said(capsys):
    clip = data.load_clip()
    data.embed_texts(clip, ["a photo of a zebra.", "another zebra", "a boat " * 40])
    said = capsys.readouterr().err
    assert said.count("zebra") == 1 and "1 of 3 texts are longer than 40 tokens and were cut" in said


def test_cache_key_follows_everything(tmp_path, monkeypatch):
    clip, folder, photo = data.load_clip(), tmp_path / "cache", tmp_path / "p.png"
    scenes.picture("test", 0)[0].save(photo)
    first = data.embed_photos(clip, [photo], folder)[0]
    monkeypatch.setattr(type(clip.model), "encode_image", lambda *_: pytest.fail("the cache was not used"))
    assert torch.equal(data.embed_photos(clip, [photo], folder)[0], first)
    monkeypatch.undo()
    scenes.picture("test", 1)[0].save(photo)
    os.utime(photo, ns=(1, 1))
    assert not torch.equal(data.embed_photos(clip, [photo], folder)[0], first)
    assert data.load_clip(resolution=128).key != clip.key != data.load_clip(precision="bf16").key
    data.embed_photos(data.load_clip(resolution=128), [photo], folder)
    data.embed_texts(clip, ["a"], folder)
    data.embed_texts(clip, ["b"], folder)
    assert len(list(folder.iterdir())) == 5 and not list(folder.glob(".*"))


def test_cache_blocks_survive_an_interruption(tmp_path, monkeypatch):
    """A run stopped in the second block keeps the first."""
    clip, photos = data.load_clip(), [("test", n) for n in range(6)]
    whole = data.embed_photos(clip, photos)[0]
    monkeypatch.setattr(data, "BLOCK", 3)
    real, calls = data.open_photo, []

    def stop_at(photo):
        calls.append(photo)
        if photo == ("test", 4):
            raise KeyboardInterrupt
        return real(photo)
    monkeypatch.setattr(data, "open_photo", stop_at)
    with pytest.raises(KeyboardInterrupt):
        data.embed_photos(clip, photos, tmp_path)
    assert len(list(tmp_path.glob("photos-*.safetensors"))) == 1
    monkeypatch.setattr(data, "open_photo", lambda photo: (calls.append(photo), real(photo))[1])
    calls.clear()
    torch.testing.assert_close(data.embed_photos(clip, photos, tmp_path)[0], whole, rtol=1e-4, atol=1e-4)
    assert sorted(calls) == photos[3:]


def test_embedding_photos_streams(tmp_path):
    """The peak of memory does not grow with the number of photos: decoded, 1,700 more of them would take 84 MB."""
    for n in range(2000):
        if n < 50:
            scenes.picture("test", n)[0].save(tmp_path / f"{n}.jpg")
        else:
            os.link(tmp_path / f"{n % 50}.jpg", tmp_path / f"{n}.jpg")
    program = ("import resource, sys, data; from pathlib import Path; count = int(sys.argv[2]); "
               "embeddings, kept = data.embed_photos(data.load_clip(), [Path(sys.argv[1]) / f'{n}.jpg' for n in range(count)], Path(sys.argv[1]) / 'cache'); "
               "assert len(embeddings) == len(kept) == count; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    peaks = [int(subprocess.run([sys.executable, "-c", program, str(tmp_path), str(count)], cwd=data.HERE, capture_output=True, text=True, check=True).stdout) for count in (300, 2000)]
    assert peaks[1] - peaks[0] < 30 * (2 ** 20 if sys.platform == "darwin" else 2 ** 10), peaks


def test_cache_damaged_shared_or_unwritable(tmp_path, capsys):
    clip, texts = data.load_clip(), ["a boat", "a car"]
    first = data.embed_texts(clip, texts, tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(data.embed_texts(clip, texts, tmp_path), first) and "damaged cache file, made anew" in capsys.readouterr().err
    write(tmp_path / "file", "")
    assert torch.equal(data.embed_texts(clip, texts, tmp_path / "file" / "under"), first) and "going on without" in capsys.readouterr().err
    file.unlink()
    results = []
    threads = [threading.Thread(target=lambda: results.append(data.embed_texts(clip, texts, tmp_path))) for _ in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    assert len(results) == 4 and all(torch.equal(result, first) for result in results)


def test_atomic_write(tmp_path):
    target = tmp_path / "a" / "x.json"
    data.write_json(target, {"value": float("nan"), "path": Path("p"), "list": (1, 2.5)})
    assert json.loads(target.read_text()) == {"value": None, "path": "p", "list": [1, 2.5]}
    with pytest.raises(UsageError, match="cannot write"):
        data.write_atomically(target / "under", "x")
    with pytest.raises(UsageError, match="cannot write.*No space left"):
        full = tmp_path / "full.txt"
        os.symlink("/dev/full", tmp_path / f".full.txt.{os.getpid()}.partial")
        data.write_atomically(full, "x" * 100)
    assert not full.exists()


def test_contact_sheet(tmp_path):
    scores = np.array([[0.9, 0.2], [0.4, 0.1], [0.3, 0.8]])
    path = data.contact_sheet([("test", n) for n in range(3)], ["sun", "moon"], scores, [[0], [], [1]], tmp_path / "sheet.png", per_row=2)
    with Image.open(path) as sheet:
        assert sheet.size[0] > 500 and sheet.size[1] > 500 and len(sheet.getcolors(2 ** 20)) > 500


def test_device():
    assert data.choose_device(None, True).type == "cpu"
    with pytest.raises(UsageError, match="exclude each other"):
        data.choose_device(0, True)
    with pytest.raises(UsageError, match="--gpu 99: this machine has"):
        data.choose_device(99, False)
