"""Holds the output directions that earlier domains claim, per projection, and its file. Knows no model and no domain.

Letters: O out features, K directions. The file is a safetensors file with one float32 (O, K) per projection, named
`layer.projection`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import safetensors.torch
import torch
from torch import Tensor

from engine.model.delta_recorder import ProjectionKey
from stack_store.atomic import replace_file
from stack_store.errors import StackInvalid
from stack_store.format import PROJECTIONS, Geometry
from stack_store.tensor_file import TensorFile
from training.errors import ProtectedSpaceInvalid

VANISHED = 1e-3  # of a direction's length: what is left of it outside the others has 1e-6 of its energy
ORTHONORMAL = 1e-4  # largest departure of VᵀV from the identity


@dataclass(frozen=True, slots=True, eq=False)
class ProtectedSpace:
    """Which directions of each projection's output are taken. Every projection of every layer is there."""

    bases: Mapping[ProjectionKey, Tensor]  # (O, K) float32, orthonormal columns, oldest first

    @classmethod
    def empty(cls, geometry: Geometry) -> Self:
        """Nothing is taken."""
        return cls({key: torch.zeros(width, 0) for key, width in _widths(geometry).items()})

    @property
    def shares(self) -> dict[ProjectionKey, float]:
        """K / O of each projection."""
        return {key: basis.shape[1] / basis.shape[0] for key, basis in self.bases.items()}

    @property
    def digest(self) -> str:
        """The sha256 in hex of the file that `save` writes."""
        return hashlib.sha256(self._file_bytes()).hexdigest()

    def save(self, path: Path) -> str:
        """Writes the file atomically and durably; returns the sha256 of its bytes in hex."""
        file_bytes = self._file_bytes()
        with replace_file(path) as file:
            file.write(file_bytes)
        return hashlib.sha256(file_bytes).hexdigest()

    @classmethod
    def load(cls, path: Path, geometry: Geometry) -> Self:
        """On the CPU, what `save` wrote. Raises ProtectedSpaceInvalid, naming file, tensor and fault."""
        widths = {name_of(key): width for key, width in _widths(geometry).items()}
        try:
            with path.open("rb") as file:
                tensors, _ = TensorFile(file, name=str(path)).load()
        except StackInvalid as error:
            raise ProtectedSpaceInvalid(str(error)) from error
        if tensors.keys() != widths.keys():
            name = min(tensors.keys() ^ widths.keys())
            raise ProtectedSpaceInvalid(f"{path}: {'lacks' if name in widths else 'has the unknown'} tensor {name!r}")
        for name, basis in tensors.items():
            _require_basis(path, name, basis, widths[name])
        return cls({key: tensors[name_of(key)] for key in _widths(geometry)})

    def _file_bytes(self) -> bytes:
        tensors = {name_of(key): basis.detach().cpu().contiguous() for key, basis in self.bases.items()}
        return bytes(safetensors.torch.save(tensors))


def name_of(key: ProjectionKey) -> str:
    """What files and reports call a projection: `layer.projection`."""
    return f"{key[0]}.{key[1]}"


def extend(space: ProtectedSpace, new: Mapping[ProjectionKey, Tensor], *, max_share: float) -> ProtectedSpace:
    """The space with new directions, (O, K) per projection and most important first, up to floor(max_share * O).

    The old columns stay as they are. Of a new one only what lies outside the others is added, and nothing if less
    than a thousandth of its length does. Raises ValueError that names the projection.
    """
    if space.bases.keys() != new.keys():
        key = min(space.bases.keys() ^ new.keys())
        raise ValueError(f"{name_of(key)} is in {'the space' if key in space.bases else 'the directions'} only")
    extended = {key: _extend_basis(basis, new[key], max_share, name_of(key)) for key, basis in space.bases.items()}
    return ProtectedSpace(extended)


def _extend_basis(old: Tensor, new: Tensor, max_share: float, name: str) -> Tensor:
    """(O, K), (O, K') -> (O, K + at most K'), by Gram and Schmidt: QR would not leave out a column that vanishes."""
    if new.ndim != 2 or new.shape[0] != old.shape[0]:
        raise ValueError(f"{name}: new directions have shape {list(new.shape)}, must be ({old.shape[0]}, K)")
    if not torch.isfinite(new).all():
        raise ValueError(f"{name}: new directions hold a value that is not finite")
    old, added = old.to(new.device), torch.zeros(new.shape[0], 0, device=new.device)
    for column in torch.split(_without(new.detach().float(), old), 1, dim=1):  # (O, 1) each
        if old.shape[1] + added.shape[1] >= _cap(old, max_share):
            break
        rest = _without(column, added)
        if rest.norm() > VANISHED:
            # Again, since dividing by a small length enlarges what rounding left inside.
            unit = _without(_without(rest / rest.norm(), old), added)
            added = torch.cat([added, unit / unit.norm()], dim=1)
    return torch.cat([old, added], dim=1)


def _without(columns: Tensor, basis: Tensor) -> Tensor:
    """(O, K'), (O, K) -> (O, K'): each column outside the basis."""
    return columns - basis @ (basis.T @ columns)


def _cap(basis: Tensor, max_share: float) -> int:
    # Rounded first: 0.29 * 100 is 28.999999999999996.
    return int(round(max_share * basis.shape[0], 6))


def _widths(geometry: Geometry) -> dict[ProjectionKey, int]:
    """O of every projection of every layer."""
    return {(layer, name): geometry.shapes[name][1] for layer in range(geometry.num_layers) for name in PROJECTIONS}


def _require_basis(path: Path, name: str, basis: Tensor, width: int) -> None:
    if basis.dtype != torch.float32 or basis.ndim != 2 or basis.shape[0] != width or basis.shape[1] > width:
        raise ProtectedSpaceInvalid(
            f"{path}: tensor {name!r} is {basis.dtype} {list(basis.shape)}, must be float32 ({width}, at most {width})"
        )
    if not torch.isfinite(basis).all():
        raise ProtectedSpaceInvalid(f"{path}: tensor {name!r} holds a value that is not finite")
    departure = (basis.T @ basis - torch.eye(basis.shape[1])).abs()
    if basis.shape[1] and departure.max() > ORTHONORMAL:
        raise ProtectedSpaceInvalid(f"{path}: tensor {name!r} is not orthonormal: off by {departure.max().item():.2g}")
