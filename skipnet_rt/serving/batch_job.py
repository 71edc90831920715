"""Prediction of very many pictures with Ray Data: actors that each hold a runtime, and rows in Parquet or JSON lines.

The pictures are divided into numbered parts. An actor computes a part as a whole and writes it to a file of that
number, which is there entirely or not at all. So whatever is killed, a part that is computed again replaces itself: no
row is lost and none is there twice; and a run that was interrupted goes on with the parts that have no file.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from skipnet_rt.model.preprocessing import Preprocessing
from skipnet_rt.serving.pictures import PictureError
from skipnet_rt.serving.predictor import Prediction, Predictor
from skipnet_rt.util.atomic import replacing

try:
    import pyarrow
    import pyarrow.parquet
    import ray
except ImportError as error:
    raise ImportError(f"batch jobs need {error.name}; install it with: pip install 'skipnet-rt[ray]'") from None

PART = 512  # picture files; of a Parquet file a part is a row group
BATCH = 64  # images in a call of the engine
WRITTEN = 4096  # rows in a row group of the results
CPUS = 2  # of an actor, where nothing else is said: fewer copies of the network than cores

FORMATS = (".parquet", ".jsonl")
_JOB = "_job.json"  # readers of Parquet leave out names that begin so

SCHEMA = pyarrow.schema([
    ("image", pyarrow.string()), ("class", pyarrow.int32()), ("label", pyarrow.string()),
    ("probability", pyarrow.float32()), ("probabilities", pyarrow.list_(pyarrow.float32())),
    ("route", pyarrow.list_(pyarrow.bool_())), ("blocks_run", pyarrow.int32()), ("computation", pyarrow.float64()),
    ("error", pyarrow.string())])
"""Of the results. All but ``image`` is null where ``error`` is not. ``computation`` is in percent."""


class JobError(Exception):
    """A job that cannot be done; the message is one line."""


@dataclass(frozen=True)
class Part:
    """What one actor computes in one go.

    Attributes:
        number: its place in the job.
        files: pictures; or one Parquet file.
        row_group: of that Parquet file.
    """

    number: int
    files: list[str]
    row_group: int | None = None


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        pictures: rows that it wrote.
        errors: those of them whose picture could not be read.
        parts: of the job.
        parts_before: of these, what earlier runs had left done.
        actors: at work.
        seconds: that it took, Ray's start included.
    """

    pictures: int
    errors: int
    parts: int
    parts_before: int
    actors: int
    seconds: float


def run_job(sources: Sequence[Path], output: Path, model: Path | None = None, *,
            preprocessing: Preprocessing | None = None, cpus: int | None = None,
            report: Callable[[str, float], None] = lambda what, share: None) -> Summary:
    """Predict pictures on a Ray cluster: the one that is running, or one of this machine's cores.

    Args:
        sources: picture files; Parquet files with a column ``image`` of files' bytes (binary, or Hugging Face's struct
            with ``bytes``); folders of them, at any depth. Every machine of the cluster must see them, and the output.
        output: a folder for the results, ``NAME.parquet`` or ``NAME.jsonl``, of files ``part-00000`` and so on, in the
            order of the sources (folders' by name). One that an interrupted run left is completed.
        model: a checkpoint; None for the bundled network.
        preprocessing: instead of the checkpoint's own.
        cpus: of each actor, and threads of its runtime. Where there are GPUs every actor has one.
        report: told what is being done and the share of it that is done.

    Raises:
        JobError: nothing to do, a source that cannot be used, or an output of another job.
    """
    if output.suffix not in FORMATS:
        raise JobError(f"{output}: results are written to NAME{' or NAME'.join(FORMATS)}")
    predictor: dict[str, Any] = {"path": model and model.absolute(), "preprocessing": preprocessing}
    Predictor(**predictor)  # says here, not in the middle of a cluster, what is wrong with the checkpoint
    parts = divided(sources, output)
    _begin(output, parts, model, preprocessing)
    left = [part for part in parts if not _target(output, part).exists()]
    report("starting Ray", 0.0)
    begun, pictures, errors, actors = time.perf_counter(), 0, 0, 0
    if left:
        with _ray():
            pool, resources = _pool(cpus, len(left))
            worker = {"predictor": {**predictor, "device": "cuda" if "num_gpus" in resources else "cpu",
                                    "threads": resources["num_cpus"]}, "output": output.absolute()}
            rows = [{"part": json.dumps(asdict(part))} for part in left]
            done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
                _Worker, compute=pool, fn_constructor_kwargs=worker, **resources)
            actors = pool.max_size
            for number, row in enumerate(done.iter_rows(), 1):
                pictures, errors = pictures + row["pictures"], errors + row["errors"]
                report("classifying", number / len(rows))
    if missing := [part.number for part in parts if not _target(output, part).exists()]:
        raise JobError(f"{output}: {len(missing)} parts were not written, the first is {missing[0]}")
    for remains in output.glob(".*.tmp"):  # of actors that were killed while they wrote
        remains.unlink()
    return Summary(pictures, errors, len(parts), len(parts) - len(left), actors, time.perf_counter() - begun)


# The plan -------------------------------------------------------------------------------------------------------------

def divided(sources: Iterable[Path], output: Path) -> list[Part]:
    """The parts of a job, in order.

    Raises:
        JobError: a source is not there, holds no picture, or the output lies in it.
    """
    parts: list[Part] = []
    pictures: list[str] = []

    def close() -> None:
        if pictures:
            parts.append(Part(len(parts), list(pictures)))
            pictures.clear()

    for file in _files(sources, output.absolute()):
        if file.suffix == ".parquet":
            close()
            for group in range(_row_groups(file)):
                parts.append(Part(len(parts), [str(file)], group))
        else:
            pictures.append(str(file))
            if len(pictures) == PART:
                close()
    close()
    if not parts:
        raise JobError("there is nothing to predict: no picture in what was given")
    return parts


def _files(sources: Iterable[Path], output: Path) -> Iterator[Path]:
    """All files, absolute: an actor works in a folder of its own. Hidden ones in folders are nobody's pictures."""
    for source in map(Path.absolute, sources):
        if source.is_dir():
            if output.is_relative_to(source):
                raise JobError(f"{output}: the results would lie among the pictures of {source}")
            yield from sorted(file for file in source.rglob("[!.]*") if file.is_file())
        elif source.exists():
            yield source
        else:
            raise JobError(f"{source}: there is no such file")


def _row_groups(file: Path) -> int:
    try:
        with pyarrow.parquet.ParquetFile(file) as opened:
            schema, groups = opened.schema_arrow, opened.num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        raise JobError(f"{file}: not a Parquet file that can be read ({str(error).splitlines()[0]})") from None
    if "image" not in schema.names or _bytes_type(schema.field("image").type) is None:
        raise JobError(f"{file}: a Parquet file needs a column 'image' of bytes, "
                       f"this one has {', '.join(f'{field.name} ({field.type})' for field in schema)}")
    return groups


def _bytes_type(kind: Any) -> Any:
    """Binary, directly or as Hugging Face's data sets have it; None for other types."""
    if pyarrow.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    return kind if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind) else None


def _target(output: Path, part: Part) -> Path:
    return output / f"part-{part.number:05}{output.suffix}"


def _begin(output: Path, parts: Sequence[Part], model: Path | None, preprocessing: Preprocessing | None) -> None:
    """Leaves a note of the job in its output, or compares it with the note that is there."""
    job = {"pictures": sha256(json.dumps([asdict(part) for part in parts]).encode()).hexdigest(),
           "model": sha256(model.read_bytes()).hexdigest() if model else "bundled",
           "preprocessing": sha256(repr(preprocessing).encode()).hexdigest()}
    output.mkdir(exist_ok=True)
    note = output / _JOB
    if not note.exists():
        if any(output.iterdir()):
            raise JobError(f"{output}: the folder holds other files")
        with replacing(note) as temporary:
            temporary.write_text(json.dumps(job))
    before = json.loads(note.read_text())
    for name, value in job.items():
        if before[name] != value:
            raise JobError(f"{output}: these are results of another job, with other {name}; choose another output")


# Ray ------------------------------------------------------------------------------------------------------------------

@contextmanager
def _ray() -> Iterator[None]:
    """A connection to Ray: the one that there is, or one for this job."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    logging.getLogger("ray").setLevel(logging.ERROR)
    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False  # we have our own
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def _pool(cpus: int | None, parts: int) -> tuple[Any, dict[str, int]]:
    """As many actors as the cluster has room for, and what each of them takes."""
    cluster = ray.cluster_resources()
    cores, gpus = max(1, int(cluster.get("CPU", 0))), int(cluster.get("GPU", 0))
    cpus = min(cpus or CPUS, cores)
    actors = min(parts, cores // cpus, *([gpus] if gpus else []))
    return ray.data.ActorPoolStrategy(size=actors), {"num_cpus": cpus, **({"num_gpus": 1} if gpus else {})}


class _Worker:
    """An actor: a predictor, and threads that read pictures.

    Args:
        predictor: arguments of :class:`Predictor`.
        output: where the parts go.
    """

    def __init__(self, predictor: dict[str, Any], output: Path) -> None:
        self._predictor, self._output = Predictor(**predictor), output
        self._readers = ThreadPoolExecutor(predictor["threads"])

    def __call__(self, row: dict[str, Any]) -> dict[str, int]:
        part = Part(**json.loads(row["part"]))
        pictures = errors = 0

        def counted() -> Iterator[dict[str, Any]]:
            nonlocal pictures, errors
            for result in self._results(part):
                pictures, errors = pictures + 1, errors + (result["error"] is not None)
                yield result

        with replacing(_target(self._output, part)) as temporary:
            (_write_parquet if self._output.suffix == ".parquet" else _write_lines)(temporary, counted())
        return {"pictures": pictures, "errors": errors}

    def _results(self, part: Part) -> Iterator[dict[str, Any]]:
        """A row for each picture, in order."""
        pictures = _pictures(part)
        while batch := list(islice(pictures, BATCH)):
            images = list(self._readers.map(self._image, (data for _, data in batch)))
            predictions = iter(self._predictor.infer([image for image in images if isinstance(image, Tensor)]))
            for (name, _), image in zip(batch, images, strict=True):
                yield self._row(name, next(predictions)) if isinstance(image, Tensor) else _refused(name, image)

    def _image(self, data: Path | bytes | None) -> Tensor | str:
        """A picture as an image, or why it is none."""
        try:
            if data is None:
                return "no picture"
            return self._predictor.image(data.read_bytes() if isinstance(data, Path) else data)
        except PictureError as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)

    def _row(self, name: str, prediction: Prediction) -> dict[str, Any]:
        (best,) = self._predictor.classes(prediction, 1)
        return {"image": name, **best, "probabilities": prediction.probabilities, "route": prediction.route,
                "blocks_run": prediction.blocks_run, "computation": 100 * prediction.computation, "error": None}


def _refused(name: str, why: str) -> dict[str, Any]:
    return {**dict.fromkeys(SCHEMA.names), "image": name, "error": why}


def _pictures(part: Part) -> Iterator[tuple[str, Path | bytes | None]]:
    """Names, and files or their bytes; of a row of a Parquet file the name is ``FILE#ROW``."""
    if part.row_group is None:
        yield from ((name, Path(name)) for name in part.files)
        return
    (name,) = part.files
    with pyarrow.parquet.ParquetFile(name) as file:
        row = sum(file.metadata.row_group(group).num_rows for group in range(part.row_group))
        for batch in file.iter_batches(BATCH, row_groups=[part.row_group], columns=["image"]):
            for value in batch.column(0).to_pylist():
                yield f"{name}#{row}", value["bytes"] if isinstance(value, dict) else value
                row += 1


def _write_parquet(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    with pyarrow.parquet.ParquetWriter(file, SCHEMA) as writer:
        while some := list(islice(rows, WRITTEN)):
            writer.write_table(pyarrow.Table.from_pylist(some, SCHEMA))


def _write_lines(file: Path, rows: Iterator[dict[str, Any]]) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for row in rows:
            lines.write(json.dumps(row) + "\n")
