"""Training patches of a prepared challenge data set, a third of them around foreground.

`data.options.path` is a folder that `python -m train.challenge` prepared, or a raw folder in
nnU-Net's layout (`dataset.json`), which is prepared once below `prepared`. The place of an example
in its batch decides whether it must hold foreground, so examples come in order; everything else is
drawn from the generator of their number. Flat patches (`patch_size` of two axes) are cut from
slices; `context` neighbor slices on each side become channels (2.5-D).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmodels.biomedical import patches
from jaxmodels.biomedical.augmentation import Augmentation, enlarged_patch
from jaxmodels.biomedical.preprocessing import Geometry, labels_of, restore_probabilities
from train.data import medical_preparation, preparation
from train.data.medical_files import DataError, RawDataset, mapped, write_labels
from train.data.stored_arrays import arrays_of
from train.naming import ConfigError

OPTIONS: dict[str, Any] = {
    "configuration": "3d_fullres",
    "patch_size": (),  # voxels; 2 or 3 axes
    "channels": 1,  # of the image itself
    "batch_size": 2,  # must equal config.batch_size
    "fold": 0,  # which fold is held out; -1 trains on all cases
    "folds": 5,
    "oversample": patches.OVERSAMPLE,
    "context": 0,
    "view": 0,  # axis whose slices flat patches are cut from
    "augmentation": "full",  # full | intensity | mirror | none: how large patches must be
    "prior": "",  # folder of label maps CASE.npy: a cascade's earlier prediction
    "prior_labels": 0,  # foreground labels of the prior
    "validation_batches": 50,
    "prepared": "",  # where a raw folder is prepared; by default below the cache
}
VARIANTS: dict[str, dict[str, Any]] = {}
SPLITS = ("train", "validation")
IN_ORDER = True


def _patch(options: Mapping[str, Any]) -> tuple[int, ...]:
    patch = tuple(int(n) for n in options["patch_size"])
    if len(patch) not in (2, 3) or min(patch) < 1:
        raise ConfigError(f"data.options.patch_size: {patch} must be 2 or 3 positive sizes")
    return patch


def _channels(options: Mapping[str, Any]) -> int:
    return int(options["channels"]) * (2 * int(options["context"]) + 1) + int(
        options["prior_labels"]
    )


def read_patch(options: Mapping[str, Any]) -> tuple[int, ...]:
    """The patch that training reads: enlarged where augmentation rotates and scales."""
    settings = Augmentation.named(options["augmentation"])
    patch = _patch(options)
    return enlarged_patch(patch) if settings and settings.rotation else patch


def _spec(patch: tuple[int, ...], options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        "image": jax.ShapeDtypeStruct((*patch, _channels(options)), np.float32),
        "label": jax.ShapeDtypeStruct(patch, np.int32),
    }


def element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """`image` float32 [*patch, C] and `label` int32 [*patch], enlarged for augmentation.

    Labels are -1 beyond the border, and outside the non-zero part of images that are masked by it.
    """
    return _spec(read_patch(options), options)


def eval_element_spec(options: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    """The same without enlargement."""
    return _spec(_patch(options), options)


network_spec = eval_element_spec


def split_sizes(options: Mapping[str, Any]) -> dict[str, int]:
    """Patches of one batch (training draws endlessly) and of all validation batches."""
    batch = int(options["batch_size"])
    return {"train": batch, "validation": batch * int(options["validation_batches"])}


@dataclasses.dataclass(frozen=True)
class _Numbers:
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return index


def source(split: str, options: Mapping[str, Any]) -> _Numbers:
    """Places in the batch (training) or numbers of validation patches."""
    cases(split, options)  # data that are not there are said before training begins
    return _Numbers(split_sizes(options)[split])


def prepared_folder(options: Mapping[str, Any]) -> Path:
    """The prepared folder of these options; a raw folder is prepared now.

    Raises DataError for a folder that is neither.
    """
    if not options["path"]:
        raise ConfigError(
            "data.options.path: name a folder in nnU-Net's raw layout, or a prepared one"
        )
    path = Path(options["path"]).expanduser()
    if (path / "plans.json").exists() and (path / "fingerprint.json").exists():
        return path
    if not (path / "dataset.json").exists():
        raise DataError(f"data.options.path {path}: neither raw (dataset.json) nor prepared")
    target = options["prepared"]
    if not target:
        name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
        target = preparation.data_directory() / "challenges" / f"{path.resolve().name}-{name}"
    target = Path(target)
    medical_preparation.prepare(path, target, options["configuration"], options["folds"])
    return target


def cases(split: str, options: Mapping[str, Any]) -> list[str]:
    """Cases that training uses, or the held-out fold (all cases where `fold` is -1)."""
    held = medical_preparation.read_json(prepared_folder(options) / "splits.json")
    fold = int(options["fold"])
    if not -1 <= fold < len(held):
        raise ConfigError(f"data.options.fold: {fold} is not in -1 .. {len(held) - 1}")
    everyone = sorted(c for one in held for c in one)
    if fold < 0:
        return everyone
    return held[fold] if split != "train" else [c for c in everyone if c not in held[fold]]


def identifier(options: Mapping[str, Any]) -> str:
    """The folder of preprocessed arrays of the configuration."""
    plans = medical_preparation.read_json(prepared_folder(options) / "plans.json")
    return medical_preparation.configuration_of(plans, options["configuration"])["identifier"]


@dataclasses.dataclass(frozen=True)
class PatchReader:
    """`(example, rng) -> patch`; `need_to_pad` is what enlargement added."""

    folder: str
    cases: tuple[str, ...]
    patch: tuple[int, ...]
    need_to_pad: tuple[int, ...]
    batch_size: int
    oversample: float
    context: int
    view: int
    prior: str
    prior_labels: int
    sparse: bool  # some voxels are unannotated: patches lie on annotated ones

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
        case = self.cases[int(rng.integers(len(self.cases)))]
        stem = f"{self.folder}/{case}"
        image, label = mapped(f"{stem}.image.npy"), mapped(f"{stem}.label.npy")
        places: dict[int, np.ndarray] = {}
        forced = patches.is_forced(index % self.batch_size, self.batch_size, self.oversample)
        if forced or self.sparse:
            places = {int(k): v for k, v in arrays_of(f"{stem}.npz").items()}
            places = dict(patches.chosen_locations(places, forced) or {})
        prior = mapped(f"{self.prior}/{case}.npy") if self.prior else None
        if prior is not None and prior.shape != label.shape:
            raise DataError(f"case {case}: the prior is {prior.shape}, the image {label.shape}")
        if self.view:
            image, label = np.moveaxis(image, self.view, 0), np.moveaxis(label, self.view, 0)
            prior = None if prior is None else np.moveaxis(prior, self.view, 0)
            order = [self.view, *(a for a in range(3) if a != self.view)]
            places = {k: v[:, order] for k, v in places.items()}
        if len(self.patch) == 2:
            return self._flat(image, label, prior, places, rng)
        start = patches.patch_start(label.shape, self.patch, rng, places, self.need_to_pad)
        parts = [patches.cut(image, start, self.patch)]
        if prior is not None:
            parts.append(self._one_hot(patches.cut(prior, start, self.patch)))
        return self._example(parts, patches.cut(label, start, self.patch, fill=-1))

    def _flat(self, image, label, prior, places, rng):
        if places:
            z, places = patches.slice_locations(places, rng)
        else:
            z = int(rng.integers(label.shape[0]))
        start = patches.patch_start(label.shape[1:], self.patch, rng, places, self.need_to_pad)
        last = label.shape[0] - 1
        slices = [min(max(z + k, 0), last) for k in range(-self.context, self.context + 1)]
        parts = [patches.cut(image[s], start, self.patch) for s in slices]
        if prior is not None:
            parts.append(self._one_hot(patches.cut(prior[z], start, self.patch)))
        return self._example(parts, patches.cut(label[z], start, self.patch, fill=-1))

    def _one_hot(self, labels):
        return (labels[..., None] == np.arange(1, self.prior_labels + 1)).astype(np.float32)

    def _example(self, parts, label):
        image = np.concatenate([np.asarray(p, np.float32) for p in parts], -1)
        return {"image": image, "label": np.asarray(label, np.int32)}


@dataclasses.dataclass(frozen=True)
class _Fixed:
    """The same patch for a number, whoever asks."""

    reader: PatchReader

    def __call__(self, index: int) -> dict[str, np.ndarray]:
        return self.reader(index, np.random.default_rng((7, index)))


def _reader(split: str, patch: tuple[int, ...], options: Mapping[str, Any]) -> PatchReader:
    final = _patch(options)
    return PatchReader(
        folder=str(prepared_folder(options) / identifier(options)),
        cases=tuple(cases(split, options)),
        patch=patch,
        need_to_pad=tuple(p - f for p, f in zip(patch, final)),
        batch_size=int(options["batch_size"]),
        oversample=float(options["oversample"]),
        context=int(options["context"]),
        view=int(options["view"]),
        prior=str(options["prior"]),
        prior_labels=int(options["prior_labels"]),
        sparse=dataset(options)["ignore_label"] is not None,
    )


def masked_channels(options: Mapping[str, Any]) -> tuple[int, ...]:
    """Channels that are 0 outside the image's non-zero part, where labels are -1."""
    if not options["path"]:
        return ()
    plans = medical_preparation.read_json(prepared_folder(options) / "plans.json")
    own = [c for c, scheme in enumerate(plans["schemes"]) if scheme == "zscore"]
    # Labels are of the middle slice.
    first = int(options["context"]) * int(options["channels"])
    return tuple(first + c for c in own) if plans["use_mask"] else ()


def task_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the segmentation task that follow from the data (and its options)."""
    known = dataset(options)
    regions = tuple(map(tuple, known["targets"].values())) if known["regions"] else ()
    return {
        "regions": regions,
        "region_order": tuple(known["region_order"]),
        "ignore_label": known["ignore_label"],
        "masked": masked_channels(options),
        **{key: int(options[key]) for key in ("prior_labels", "context", "view")},
    }


def train_transform(options: Mapping[str, Any]) -> PatchReader:
    """A random patch of a random training case."""
    return _reader("train", read_patch(options), options)


def eval_transform(options: Mapping[str, Any]) -> _Fixed:
    """A fixed patch of a held-out case."""
    return _Fixed(_reader("validation", _patch(options), options))


def dataset(options: Mapping[str, Any]) -> dict[str, Any]:
    """`dataset.json` of the prepared folder: labels, targets, regions."""
    return medical_preparation.read_json(prepared_folder(options) / "dataset.json")


def held_out(options: Mapping[str, Any]) -> Iterator[tuple[str, np.ndarray, np.ndarray, Geometry]]:
    """(case, image [z, y, x, C + prior], label [z, y, x], geometry) of the held-out fold."""
    folder = prepared_folder(options) / identifier(options)
    for case in cases("validation", options):
        image = mapped(str(folder / f"{case}.image.npy"))
        if options["prior"]:
            prior = mapped(f"{options['prior']}/{case}.npy")
            image = with_prior(image, prior, int(options["prior_labels"]))
        geometry = Geometry.from_json(medical_preparation.read_json(folder / f"{case}.json"))
        yield case, image, mapped(str(folder / f"{case}.label.npy")), geometry


def with_prior(image: np.ndarray, prior: np.ndarray, labels: int) -> np.ndarray:
    """An image with a label map's one-hot foreground channels behind its own."""
    hot = (np.asarray(prior)[..., None] == np.arange(1, labels + 1)).astype(np.float32)
    return np.concatenate([np.asarray(image, np.float32), hot], -1)


def prediction_cases(path: str | Path, options: Mapping[str, Any]):
    """(case, preprocessed image, `write(probabilities, folder) -> file`) of a folder of images.

    Files are CASE_0000.EXT, with the ending of the training data. Raises ConfigError for a
    cascade, whose first stage only `python -m train.challenge` knows.
    """
    if options["prior"]:
        raise ConfigError("data.options.prior: a cascade is predicted by python -m train.challenge")
    prepared = prepared_folder(options)
    plans = medical_preparation.read_json(prepared / "plans.json")
    known = medical_preparation.read_json(prepared / "dataset.json")
    path = Path(path)
    raw = RawDataset(
        path.parent,
        tuple(known["channels"]),
        known["labels"],
        known["ending"],
        tuple(known["region_order"]),
    )
    split = path.name.removeprefix("images")
    if path.name != f"images{split}" or not path.is_dir():
        raise DataError(f"{path}: wanted a folder imagesTs (or imagesNAME) of CASE_0000 files")
    order = known["region_order"] if known["regions"] else None
    for case in raw.cases(split):
        image, spacing = raw.image(case, split)
        array, _, geometry = medical_preparation.prepared_case(
            plans, options["configuration"], image, spacing
        )
        files = raw.image_files(case, split)

        def write(probabilities, folder, case=case, geometry=geometry, like=files[0]):
            restored = restore_probabilities(probabilities, geometry, known["regions"])
            target = Path(folder) / f"{case}{raw.ending}"
            write_labels(target, labels_of(restored, order), like)
            return target

        yield case, array, write
