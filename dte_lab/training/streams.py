"""Pictures of a Hugging Face dataset or the tars of a WebDataset, read as they come.

The library `datasets` reads them, shards shared out to the processes and shuffled within a buffer;
nothing is stored. Which pictures a step sees depends on the number of processes, other than where
items have an index, and a run that goes on has to read past what it has seen: a cache, filled from
a stream once, has neither drawback.
"""

from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

from torch.utils.data import IterableDataset

from dte_lab.common.errors import DTEError
from dte_lab.common.random import stream
from dte_lab.training.pictures import (
    MOST_SKIPPED,
    PICTURES,
    check_columns,
    check_counts,
    example_of_row,
    hub_library,
    make_item,
    readable,
)
from dte_lab.training.step import ALONE, Processes

BUFFER = 1000  # pictures, undecoded, that are shuffled


class StreamedPictures(IterableDataset):
    """Items of `pretrain`, over and over; the whole dataset, or what `part` takes of it.

    source: the name of a hub dataset; or a folder of tars or the address or pattern of some.
    pictures: how many a cache takes.
    Raises DTEError when `datasets` is missing or the dataset has no pictures.
    """

    def __init__(
        self, source: str | Path, resolution: int, crops: int = 0, pictures: int | None = None,
        seed: int = 0,
    ) -> None:  # fmt: skip
        check_counts(crops, pictures)
        library = hub_library(str(source))
        where, options = str(source), {}
        if is_webdataset(source):
            files = str(Path(source) / "*.tar") if Path(source).is_dir() else str(source)
            where, options = "webdataset", {"data_files": {"train": files}}
        with readable(str(source)):
            rows = library.load_dataset(where, split="train", streaming=True, **options)
            columns = rows.column_names or list(next(iter(rows)))
        check_columns(str(source), columns)
        for name in set(PICTURES) & set(columns):  # decoded here, so that a bad one can be skipped
            rows = rows.cast_column(name, library.Image(decode=False))
        self.rows = rows.shuffle(seed=seed, buffer_size=BUFFER)
        self.library, self.resolution, self.crops, self.seed = library, resolution, crops, seed
        self.source = f"{source} with {crops} crops, streamed"
        self.pictures, self.processes, self.start = pictures, ALONE, 0

    def __len__(self) -> int:
        """How many a cache takes. Raises DTEError where that was not said."""
        if self.pictures is None:
            raise DTEError("A stream has no end: say how many --pictures a cache is to take.")
        return self.pictures

    def part(self, processes: Processes, start: int) -> "StreamedPictures":
        """What one of the processes sees, from its item number `start` on."""
        part = object.__new__(StreamedPictures)
        part.__dict__ |= self.__dict__ | {"processes": processes, "start": start}
        return part

    def __iter__(self) -> Iterator[dict]:
        """Items as of `ClassPictures`, one for each row, so that they can be counted.

        In place of a bad row stands the next good one. Raises DTEError for `MOST_SKIPPED` bad ones
        in a row.
        """
        skipped = []
        for number, row in islice(enumerate(self.forever()), self.start, None):
            generator = stream(self.seed, "crops", self.processes.rank, number)
            try:
                example = example_of_row(row)
                item = make_item(example, self.resolution, generator if self.crops else None)
            except (ValueError, OSError) as error:
                skipped.append(f"{row.get('__key__', number)}: {error}")
                if len(skipped) == MOST_SKIPPED:
                    raise DTEError(
                        f"{MOST_SKIPPED} pictures in a row cannot be read: {skipped[0]}"
                    ) from error
                continue
            yield from (item | {"skipped": name} for name in [*skipped, ""])
            skipped = []

    def forever(self) -> Iterator[dict]:
        from datasets.distributed import split_dataset_by_node

        rows = split_dataset_by_node(self.rows, self.processes.rank, self.processes.count)
        for epoch in count():
            rows.set_epoch(epoch)
            row = None
            with readable(self.source):
                for row in rows:
                    yield row
            if row is None:
                raise DTEError(
                    f"{self.source}: there is nothing for process {self.processes.rank}."
                )


def is_webdataset(source: str | Path) -> bool:
    """Whether it is a tar, addresses of some, or a folder that holds some."""
    return str(source).endswith(".tar") or any(Path(source).glob("*.tar"))
