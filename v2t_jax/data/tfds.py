"""Writes what `readers` reads as a TFDS data set, in ArrayRecord files and without TensorFlow, for other programs."""

import contextlib
import re
import sys
from pathlib import Path
from typing import Any

from v2t_jax.data.readers import open_source
from v2t_jax.errors import InputError


def prepare_tfds(source: str, folder: Path, name: str) -> Path:
    """Writes a data set with one field "text" and one part "train" to TFDS's data directory; returns its own folder."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise InputError(f"{name!r} is no name for a TFDS data set: use small letters, digits and _, a letter first.")
    if (folder / name).exists():  # TFDS would return what is there, whatever it was made of
        raise InputError(f"{folder / name} exists: give another name, or delete it.")
    records = ((i, {"text": text}) for i, text in enumerate(open_source(source)))
    with contextlib.redirect_stdout(sys.stderr):  # it prints
        import tensorflow_datasets as tfds

        class Texts(tfds.dataset_builders.AdhocBuilder, skip_registration=True):  # type: ignore[call-arg]
            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:  # the inherited one loads TensorFlow
                return {"train": records}

        try:
            builder = Texts(
                name=name,
                version="1.0.0",
                features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
                split_datasets={},
                data_dir=str(folder),
                file_format="array_record",
                disable_shuffling=True,  # by default TFDS shuffles by key
            )
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(try_download_gcs=False, compute_stats="skip")
            )
        except OSError as error:
            raise InputError(
                f"{folder} can't be written ({error.strerror or error}): free space or give another folder."
            ) from error
    return Path(builder.data_dir)
