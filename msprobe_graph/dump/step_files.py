"""The files of steps.

A step's folder is whole when its manifest says "finished": a folder with JSON alone appears in one piece, and in one
with tensors the manifest is the last file written, and each file of JSON is replaced in one piece. So a process killed
at any moment leaves finished steps whole and an unfinished one recognisable.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from .budget import Budget
from .completion import encode_step
from .encode import OfEntries, SameAgain, document, entry_lines, lines
from .folder import TENSOR_FOLDER, step_folder, write_folder, write_whole
from .forms import Form, Forms, Likely, Parts, tables
from .manifest import Manifests, Provenance
from .records import Arriving, Entry, Hole, Step
from .saved import File, same_files
from .stack import Stacks
from .template import Filled

log = logging.getLogger("msprobe_graph")


class StepFiles:
    """Writes one process's steps under `dump_path`. What is written counts in `budget`.

    An OSError (disk full, folder gone) sets `failed` and is logged: from then on nothing is written.
    """

    def __init__(self, dump_path: Path, provenance: Provenance, budget: Budget) -> None:
        self.dump_path = dump_path
        self._path = str(dump_path)
        self.provenance = provenance
        self.failed: OSError | None = None
        self._budget = budget
        self._manifests = Manifests(provenance)
        self._stacks = OfEntries(Stacks().encode)
        self._tree = SameAgain()
        """Of construct.json."""
        self._trees = OfEntries(lambda entries: self._tree.encode(self._construct(entries)))
        self._begun: set[int] = set()
        """The steps of which there is something that isn't finished. To ask the disk in each step costs a turn at the
        interpreter's lock."""
        self.forms: Forms | None = None
        """Of the steps that were written here; None where nobody asks."""
        self._last: dict[str, tuple[bytes, Path]] = {}
        """Of the files that are mostly the same from step to step: contents, and where a file with them is."""

    def folder(self, step: int) -> Path:
        return Path(self.path(step))

    def path(self, step: int) -> str:
        """The folder's."""
        return step_folder(self._path, step, self.provenance.process)

    def tensor_file(self, step: int, name: str) -> Path:
        return self.folder(step) / TENSOR_FOLDER / name

    def take_step(self, step: Step) -> None:
        """Complete a step and write it."""
        likely, arrived = Likely.of(step), tables(step)
        encode_step(step, self)
        self.write(step)
        if self.forms is not None and likely is not None and self.failed is None and not self._budget.full:
            self.forms.learn(likely, arrived, partial(self._form, step, arrived))

    def take_file(self, file: File) -> None:
        self.write(file)

    def keep(self, step: int, names: Sequence[str], value: torch.Tensor) -> bool:
        """See `saved.Sink`."""
        if not self._budget.take(value.nbytes, kept=False):
            return False
        for file in same_files(step, names, value):
            self.write(file)
        return True

    def drop(self, step: int) -> None:
        """Remove what there is of a step."""
        self._begun.discard(step)
        shutil.rmtree(self.folder(step), ignore_errors=True)
        with suppress(OSError):  # other processes have it, too
            self.folder(step).parent.rmdir()

    def write(self, job: File | Step) -> None:
        """Write a file, or a step that is complete."""
        if self.failed is not None:
            return
        try:
            if isinstance(job, Step):
                self._write_step(job)
            else:
                self._write_file(job)
        except OSError as error:
            self.failed = error
            log.error(
                "msprobe_graph stopped writing to %s (%s); what was captured since is lost", self.dump_path, error
            )

    def _write_file(self, file: File) -> None:
        self._begun.add(file.step)
        path = self.tensor_file(file.step, file.name)
        if not path.parent.exists():
            self._begin(path.parent.parent, file.step)
            path.parent.mkdir()
        saved = file.saved
        if saved.value is not None:
            try:
                _save_tensor(saved.value, path)
                saved.path = path
            finally:
                saved.value = None
        elif saved.path is not None:
            try:
                os.link(saved.path, path)
            except OSError:  # a file system without hard links
                shutil.copyfile(saved.path, path)

    def _begin(self, folder: Path, step: int) -> None:
        """Make the step's folder, with a manifest that says that the step is not finished."""
        if not folder.exists():
            folder.mkdir(parents=True)
            write_whole(folder / "manifest.json", self._manifests.encode(Step(step)))

    def _write_step(self, step: Step) -> None:
        folder = self.folder(step.number)
        begun = step.number in self._begun and folder.exists()
        files = {name: b"".join(map(bytes, parts)) for name, parts in self._files(step, begun).items()}
        self._budget.add(sum(map(len, files.values())))
        if self._budget.full:
            step.holes.append(Hole("later steps", f"max_bytes ({self._budget.limit}) is reached"))
        files["manifest.json"] = self._manifests.encode(step)
        if step.finished:
            self._begun.discard(step.number)
        else:
            self._begun.add(step.number)
        if not begun and write_folder(folder, files, self._same(folder, files)):
            return
        for name, content in files.items():
            write_whole(folder / name, content)

    def _files(self, step: Step, begun: bool) -> dict[str, Parts]:
        """All but the manifest."""
        head = self._head(self.folder(step.number), begun)
        own = self._own(step)
        entries = list(step.all_entries)
        files: dict[str, Parts] = {
            "dump.json": document(head, [*(block.lines or b"" for block in step.blocks), own]),
            "stack.json": [self._stacks(entries)],
            "construct.json": [self._trees(entries)],
        }
        if step.saved:
            files["debug.json"] = document(head, [lines(step.saved.items())])
        return files

    def _own(self, step: Step) -> bytes | Filled:
        """What dump.json holds of the entries that are in no block."""
        return entry_lines(step.entries) if step.alike is None else step.alike.encode(step.entries)

    def _form(self, step: Step, arrived: Sequence[Arriving]) -> Form | None:
        """That of a step that was written; None where some of its text has no holes, but numbers."""
        files = self._files(step, begun=False)
        filled = sum(isinstance(part, Filled) for parts in files.values() for part in parts)
        wanted = sum(bool(block.lines) for block in step.blocks)
        if filled < wanted + (step.alike is not None and bool(self._own(step))):
            return None
        return Form(files, arrived, self._manifests.frame(step))

    def _same(self, folder: Path, files: Mapping[str, bytes]) -> dict[str, Path]:
        """Of these files, which are to be in `folder`, those whose contents the last step's file has."""
        same = {}
        for name in ("stack.json", "construct.json"):
            contents, path = self._last.get(name, (None, None))
            if path is not None and contents is files[name]:
                same[name] = path
            self._last[name] = files[name], folder / name
        return same

    def _construct(self, entries: Sequence[Entry]) -> dict[str, str | None]:
        """Each entry's parent; empty at the levels that know no modules, as msProbe's is."""
        if self.provenance.level not in ("L0", "mix"):
            return {}
        return {entry.name: entry.parent for entry in entries if entry.nested}

    def _head(self, folder: Path, begun: bool) -> dict[str, str | None]:
        tensors = folder / TENSOR_FOLDER
        return {
            "task": self.provenance.task,
            "level": self.provenance.level,
            "framework": "pytorch",
            "dump_data_dir": str(tensors) if begun and tensors.exists() else None,
        }


def _save_tensor(value: torch.Tensor, path: Path) -> None:
    """torch.save, which makes a RuntimeError of a disk that refuses."""
    try:
        torch.save(value, path)
    except RuntimeError as error:
        raise OSError(f"torch.save could not write {path}: {error}".partition("\n")[0]) from error
