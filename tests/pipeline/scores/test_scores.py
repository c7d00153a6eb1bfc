"""Features and scores, held by torch-fidelity's own call on the same images and by closed forms."""

import pickle
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import tiny_experiment
from fidelity import Images, arguments
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

from pipeline.engine.find import make_place
from pipeline.errors import PipelineError
from pipeline.scores import classifier, efficientnet, extractors, image_sets, inception, projection
from pipeline.scores import distances as scores
from pipeline.scores.extractors import Extractor
from pipeline.scores.preparations import fit_gaussian
from pipeline.store import tars
from pipeline.store.files import hash_file

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(sharded_storage):
    data = make_place(tiny_experiment(), sharded_storage).data
    return tars.load_images(data, "train"), tars.load_images(data, "test")


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The classifier's file, trained as the pipeline trains it, but for a third of the steps."""
    path = tmp_path_factory.mktemp("classifier") / "classifier.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "STEPS", 250)
        save_file(classifier.fit_classifier(*digits[0], 10).state_dict(), path)
    return path


@pytest.fixture(scope="module", params=["classifier", "projection"])
def extractor(request, trained):
    if request.param == "classifier":
        return in_file("classifier", trained)
    return saved("projection", projection.Projection(1), trained.with_name("projection.safetensors"))


def in_file(kind, path):
    return Extractor(kind, path, hash_file(path))


def saved(kind, net, path):
    save_file(net.state_dict(), path)
    return in_file(kind, path)


def their_scores(extractor, images, reference, whole=True):
    """torch-fidelity's own call, on the same extractor and images; without FID and shuffled IS unless `whole`."""
    knows_classes, n = extractor.kind != "projection", min(len(images), len(reference))
    images, reference = (Images(torch.from_numpy(its)) for its in (images, reference))
    settings = {
        "input1": images, "cuda": False, "cache": False, "save_cpu_ram": True, "verbose": False,
        "batch_size": 50, "isc_splits": min(scores.SPLITS, len(images)), "isc": knows_classes,
    }  # fmt: skip
    metrics = ("fid", "kid", "prc", *(("isc",) if knows_classes else ()))
    found = torch_fidelity.calculate_metrics(
        **settings, **arguments(extractor, *metrics), input2=reference, fid=whole, kid=True, prc=True,
        kid_subset_size=n // 2, samples_shuffle=False,
    )  # fmt: skip
    del found["f_score"]
    if knows_classes and whole:
        shuffled = torch_fidelity.calculate_metrics(**settings, **arguments(extractor, "isc"))
        found |= {f"shuffled_{name}": value for name, value in shuffled.items()}
    return found


def our_scores(parts, reference, whole=True):
    """Under torch-fidelity's names, from (features, logits) in parts, and those of the reference."""
    features, real = np.concatenate([part for part, _ in parts]), reference[0]
    sums = scores.sum_features(parts, len(features))
    found = {}
    if whole:
        statistics = scores.Moments.from_features(real).to_statistics()
        found["frechet_inception_distance"] = scores.compute_fid(sums.moments.to_statistics(), statistics)
    kid, prc = scores.compute_kid(features, real), scores.compute_precision_recall(features, real)
    found["kernel_inception_distance_mean"], found["kernel_inception_distance_std"] = kid
    found["precision"], found["recall"] = prc
    for prefix, its in (("", sums.in_order), ("shuffled_", sums.shuffled if whole else None)):
        if its:
            names = (f"{prefix}inception_score_mean", f"{prefix}inception_score_std")
            found |= zip(names, its.compute_inception_score(), strict=True)
    return found


def assert_equal_scores(ours, theirs, swapped):
    assert ours == pytest.approx(theirs, rel=1e-5)  # torch-fidelity's mean is float32
    for name, value in theirs.items():
        assert swapped[name] != pytest.approx(value, rel=1e-3), f"{name} does not see its input"


def test_scores_equal_torch_fidelitys_own_call(extractor, digits):
    images, reference = digits[1][0][:203], digits[0][0][:400]
    theirs = their_scores(extractor, images, reference)
    real = extractors.extract_features(extractor, reference, CPU)
    parts = [extractors.extract_features(extractor, part, CPU) for part in np.split(images, [64, 128])]
    swapped = [extractors.extract_features(extractor, 255 - images, CPU)]
    assert len(theirs) == (9 if extractor.kind == "classifier" else 5)
    assert_equal_scores(our_scores(parts, real), theirs, our_scores(swapped, real))


def test_classifier_knows_digits_and_its_name_is_its_content(trained, digits):
    net = classifier.load_classifier(trained)
    assert classifier.measure_accuracy(net, *digits[1]) >= 0.95
    net.head.bias.data += 1
    other = saved("classifier", net, trained.with_name("other.safetensors")).name
    assert other.startswith("classifier-") and in_file("classifier", trained).name != other


def test_training_the_classifier_repeats_bit_for_bit(digits, monkeypatch):
    monkeypatch.setattr(classifier, "STEPS", 5)
    first = classifier.fit_classifier(*digits[0], 10).state_dict()
    torch.manual_seed(99)
    torch.set_num_threads(2)
    try:
        second = classifier.fit_classifier(*digits[0], 10).state_dict()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_extractors_take_larger_images_with_colours(tmp_path):
    images = image_sets.draw_noise_images(0, 3, (3, 256, 256))
    nets = (("classifier", classifier.Classifier(3, 7), 7), ("projection", projection.Projection(3), 0))
    for kind, net, classes in nets:
        features, logits = extractors.extract_features(saved(kind, net, tmp_path / kind), images, CPU)
        assert features.shape == (3, 64) and logits.shape == (3, classes)


def test_efficientnet_knows_a_temple_and_its_own_weights(sharded_storage, monkeypatch):
    pytest.importorskip(efficientnet.PACKAGE)
    place = make_place(tiny_experiment("evaluate.features=efficientnet-lite0"), sharded_storage)
    image = load_sample_images().images[0].transpose(2, 0, 1)[None].copy()
    features, logits = extractors.extract_features(extractors.find_extractor(place), image, CPU)
    bell_cote, monastery, palace, stupa = 442, 663, 698, 832
    assert features.shape == (1, 1280) and logits.argmax() in (bell_cote, monastery, palace, stupa)
    for name, message in (("SHA256", "is not the published file"), ("PACKAGE", "pip install")):
        monkeypatch.setattr(efficientnet, name, "other")
        with pytest.raises(PipelineError, match=message):
            extractors.find_extractor(place)


def test_settings_and_kid_subsets_are_torch_fidelitys():
    """Ours are spelled, since the import takes seconds."""
    names = ("isc_splits", "rng_seed", "kid_subsets", "kid_subset_size", "prc_neighborhood")
    ours = (scores.SPLITS, scores.SEED, scores.KID_SUBSETS, scores.KID_SUBSET_SIZE, scores.NEIGHBOURS)
    assert ours == tuple(DEFAULTS[name] for name in names) and inception.URL == URL_INCEPTION_V3
    assert scores.choose_kid_subset_size(50_000, 10_000) == scores.choose_kid_subset_size(1000, 1000) == 1000
    assert scores.choose_kid_subset_size(999, 5000) == 499 and scores.choose_kid_subset_size(5000, 4) == 2
    features = np.ones((3, 2), np.float32)
    with pytest.raises(PipelineError, match="3 images have no KID"):
        scores.compute_kid(features, features)
    with pytest.raises(PipelineError, match="3 images have no precision"):
        scores.compute_precision_recall(features, features)
    for few in (2, 9, 10):  # splits of one image have no Inception score
        found = scores.sum_features([(features.repeat(4, axis=0)[:few],) * 2], few)
        assert found.in_order is None and found.shuffled is None and len(found.classes) == few


def test_closed_form_of_the_frechet_distance():
    a = scores.Statistics(9, np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    b = scores.Statistics(9, np.array([0.0, 0.0]), np.diag([1.0, 1.0]))
    assert scores.compute_fid(a, b) == pytest.approx(5 + (2 - 1) ** 2 + (3 - 1) ** 2, rel=1e-12)
    for n, width, at_most in ((50, 4, 1e-10), (50, 64, 1), (30, 64, 1), (40, 3, 1)):
        features = np.random.default_rng(0).normal(size=(n, width))
        same = scores.Moments.from_features(features).to_statistics()
        assert 0 <= scores.compute_fid(same, same) < at_most, "rounding leads below zero"


def test_gaussian_has_the_mean_and_covariance_and_rows_of_their_own():
    rng = np.random.default_rng(3)
    images = rng.normal(128, 20, (4000, 1, 1, 1)) + rng.normal(0, 5, (4000, 1, 2, 2))
    images = np.clip(images, 0, 255).astype(np.uint8)
    mean, factor = fit_gaussian([images[:1000], images[1000:]])
    drawn = image_sets.draw_gaussian_images(mean, factor, 0, 4000, (1, 2, 2))
    flat, ours = (x.reshape(4000, 4).astype(float) for x in (images, drawn))
    assert np.allclose(flat.mean(axis=0), ours.mean(axis=0), atol=1.5)
    assert np.allclose(np.cov(flat.T), np.cov(ours.T), rtol=0.1)
    assert np.array_equal(drawn[7:9], image_sets.draw_gaussian_images(mean, factor, 7, 9, (1, 2, 2)))
    noise = image_sets.draw_noise_images(0, 500, (3, 4, 4))
    assert noise.min() == 0 and noise.max() == 255 and abs(noise.mean() - 127.5) < 2
    assert np.array_equal(noise[7:9], image_sets.draw_noise_images(7, 9, (3, 4, 4)))


def test_inception_from_a_local_file_equals_torch_fidelitys_call(tmp_path, monkeypatch):
    """All but the FID, whose eigenvalues take long, and the shuffled IS. Weights are as He initialises them."""
    with pytest.MonkeyPatch.context() as patch:
        module = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
        patch.setattr(module, lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            layer.weight.data *= 1.15  # pooling takes a share of the variance
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    monkeypatch.setattr(scores, "SPLITS", 2)  # a split of one image has a score of 1, whatever it shows
    network = Extractor(inception.NAME, *inception.copy_weights(str(tmp_path / "weights.pth"), tmp_path))
    assert network.name.startswith("inception-v3-compat-") and not network.is_published
    coarse = image_sets.draw_noise_images(0, 10, (3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)
    noise, pale = coarse[:5], coarse[5:] // 2 + 64
    theirs = their_scores(network, noise, pale, whole=False)
    ours, real = ([extractors.extract_features(network, images, CPU)] for images in (noise, pale))
    a, b = ours[0][0], real[0][0]  # where features vanish any input scores zero, which proves nothing
    assert np.median(np.concatenate([a, b]).std(axis=0)) > 0.1
    assert np.square(a.mean(axis=0) - b.mean(axis=0)).sum() > 1
    assert_equal_scores(our_scores(ours, real[0], False), theirs, our_scores(real, ours[0], False))
    grey, logits = extractors.extract_features(network, noise[:1, :1], CPU)
    colour, _ = extractors.extract_features(network, noise[:1, :1].repeat(3, axis=1), CPU)
    assert np.array_equal(grey, colour) and logits.shape == (1, 1008)
    extractors.load_extractor.cache_clear()


class Bomb:
    def __reduce__(self):
        return print, ("code of a weights file was run",)


@pytest.mark.parametrize(("content", "message"), [
    ({"classifier.0.weight": torch.zeros(3)}, r"\(sha256 [0-9a-f]{8}\) is not Inception.*Missing key"),
    (b"not a file of weights", "is broken or holds more than plain tensors"),
    (pickle.dumps({"a": Bomb()}, protocol=2), "is broken or holds more than plain tensors"),
], ids=["vgg", "text", "pickle"])  # fmt: skip
def test_other_weights_are_named_and_read_as_tensors_only(content, message, tmp_path, capsys):
    path = tmp_path / "weights.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(PipelineError, match=rf"weights\.pth {message}"):
        inception.copy_weights(str(path), tmp_path / "cache")
    assert "was run" not in capsys.readouterr().out
    assert not [*(tmp_path / "cache").glob("*")], "nothing is kept that a later run would trust"


def test_missing_inception_weights_say_where_to_put_them_and_damaged_ones_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", Mock(side_effect=OSError("no route to host")))
    with pytest.raises(PipelineError, match=r"no route to host.*evaluate\.extractor_weights.*6726825d\.pth"):
        inception.copy_weights(None, tmp_path)
    inception.locate_download().write_bytes(b"half")
    with pytest.raises(PipelineError, match="damaged"):
        inception.copy_weights(None, tmp_path)


def test_tf32_is_off_around_features_and_restored(monkeypatch, trained, digits):
    seen, extractor = [], in_file("classifier", trained)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    net = extractors.load_extractor(extractor, CPU)
    hook = net.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.allow_tf32))
    extractors.extract_features(extractor, digits[1][0][:2], CPU)
    hook.remove()
    assert seen == [False] and torch.backends.cudnn.allow_tf32
