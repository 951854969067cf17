"""What a patch file says about itself: method, backbone, D_h, evaluation, and a record a matrix.

The manifest lies as JSON in the file's header (docs/patch_format.md). Everything in it is checked
by type and range when it is read; an unknown or missing key is an error that names it. The text of
D_h is never in it, only its fingerprint.
"""

from math import isfinite, prod
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, model_validator

from spkit.errors import SpkitError
from spkit.patchfile.encoding import BLOCK, GROUP, blocks
from spkit.patchfile.floats import BITS

FORMAT, VERSION = "spkit-patch", 1
PARTS = ("positions", "values", "replaced", "originals")
LONGEST_TEXT = 2_000
MOST_TENSORS = 100_000
MOST_WEIGHTS = 1 << 40  # of one matrix

Count = Annotated[int, Field(ge=0, le=MOST_WEIGHTS)]
Size = Annotated[int, Field(ge=0, le=BLOCK * 8)]  # bytes of one frame
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# whatever is printed in a terminal or a card cannot hold control characters
TensorName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]{1,200}$")]
Values = Literal["exact", "bfloat16", "int8"]


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("a text with control characters")
    return text


Text = Annotated[str, Field(max_length=LONGEST_TEXT), AfterValidator(_printable)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class Block(Strict):
    """One block of a matrix: how many weights are kept, and the size in bytes of every frame.

    values: a frame for each byte of a value, the highest first (in 8 bits: the integers, then the
    four bytes of the scales). replaced: of the weights whose patched value no 16-bit delta gives,
    (indices among the kept, their patched bits). originals: a frame for each byte of the backbone's
    kept weights; empty where the patch is not revertible.
    """

    kept: Annotated[int, Field(ge=0, le=BLOCK)]
    encoding: Literal["gaps", "bitmap"]
    positions: Size
    values: Annotated[list[Size], Field(max_length=5)]
    exceptions: Annotated[int, Field(ge=0, le=BLOCK)] = 0
    replaced: Annotated[list[Size], Field(max_length=2)] = []
    originals: Annotated[list[Size], Field(max_length=4)] = []

    def frames(self, part: str) -> list[int]:
        """The sizes of one part's frames in this block."""
        return [self.positions] if part == "positions" else getattr(self, part)


class Matrix(Strict):
    """One patched weight matrix.

    shape: (out, in). dtype: the backbone's. before, after: BLAKE3 of the tensor's bytes in the
    backbone and patched. lost: kept deltas that change nothing in the backbone's dtype. values: the
    dtype in which they are stored. sha256: {part: of its bytes in this file}.
    """

    shape: Annotated[
        list[Annotated[int, Field(ge=1, le=MOST_WEIGHTS)]], Field(min_length=2, max_length=2)
    ]
    dtype: Literal["BF16", "F16", "F32"]
    before: Digest
    after: Digest
    kept: Count
    lost: Count
    values: Literal["BF16", "F16", "F32", "I8"]
    sha256: dict[Literal["positions", "values", "replaced", "originals"], Digest]
    blocks: list[Block]

    @model_validator(mode="after")
    def _consistent(self):
        if self.weights > MOST_WEIGHTS or len(self.blocks) != -(-self.weights // BLOCK):
            raise ValueError(f"{len(self.blocks)} blocks for the shape {self.shape}")
        if sum(block.kept for block in self.blocks) != self.kept or self.lost > self.kept:
            raise ValueError("the kept weights of the blocks do not add up")
        width = 5 if self.values == "I8" else BITS[self.values].itemsize
        original = BITS[self.dtype].itemsize if "originals" in self.sha256 else 0
        for block, (_, length) in zip(self.blocks, blocks(self.weights), strict=True):
            right = block.kept <= length and block.exceptions <= block.kept
            right &= len(block.values) == width and len(block.originals) == original
            right &= len(block.replaced) == (2 if block.exceptions else 0)
            if not right:
                raise ValueError("a block whose counts do not fit together")
        needed = {part for part in PARTS if any(block.frames(part) for block in self.blocks)}
        if set(self.sha256) != needed:
            raise ValueError(f"digests of {sorted(self.sha256)}, {sorted(needed)} expected")
        return self

    @property
    def weights(self) -> int:
        """How many weights the matrix has."""
        return prod(self.shape)

    def size(self, part: str) -> int:
        """The bytes of one part."""
        return sum(sum(block.frames(part)) for block in self.blocks)

    def groups(self, kept: int) -> int:
        """How many scales a block with so many 8-bit values has."""
        return -(-kept // GROUP)


class Backbone(Strict):
    """What the patch was made for: a name (never a local path), and a hash of its config.json."""

    name: Text
    revision: Text | None
    architecture: Text
    config_sha256: Digest


class Error(Strict):
    """What storing the values cost, against the float32 deltas.

    relative_rms: |stored - delta| / |delta| over all kept weights. largest: the largest |stored -
    delta|. changed: patched weights that differ from the float32 composition in the backbone's
    dtype.
    """

    relative_rms: Annotated[float, Field(ge=0)]
    largest: Annotated[float, Field(ge=0)]
    changed: Count


class Manifest(Strict):
    """The whole manifest; `tensors` in the order of their data in the file.

    method: name, parameters, strengths and seeds. data: fingerprint and size of D_h. evaluation:
    rows of evaluation.rates. stack: ids of the patches of which this one is made, in their order.
    """

    format: Literal["spkit-patch"]
    version: Literal[1]
    method: dict[Text, JsonValue]
    data: dict[Text, JsonValue]
    backbone: Backbone
    versions: dict[Text, Text]
    evaluation: list[dict[Text, Text | int | float | bool | None]]
    values: Values
    error: Error
    revertible: bool
    stack: list[Digest] = []
    tensors: Annotated[dict[TensorName, Matrix], Field(min_length=1, max_length=MOST_TENSORS)]

    @model_validator(mode="after")
    def _consistent(self):
        for name, matrix in self.tensors.items():
            if ("originals" in matrix.sha256) is not self.revertible:
                raise ValueError(f"{name!r} does not say the same about originals as the file")
        for tree in (self.method, self.data):
            _check_texts(tree)
        return self

    @property
    def kept(self) -> int:
        """Kept weights of all matrices."""
        return sum(matrix.kept for matrix in self.tensors.values())

    @property
    def lost(self) -> int:
        """Kept deltas that change nothing in the backbone's dtype."""
        return sum(matrix.lost for matrix in self.tensors.values())

    @property
    def weights(self) -> int:
        """All weights of the patched matrices."""
        return sum(matrix.weights for matrix in self.tensors.values())

    def size(self, part: str) -> int:
        """Bytes of one part over all matrices."""
        return sum(matrix.size(part) for matrix in self.tensors.values())


def read_manifest(text: bytes) -> Manifest:
    """The manifest of a header; ValueError in one sentence, that of another version included."""
    from pydantic import ValidationError

    from spkit.models.checkpoint_files import load_json

    tree = load_json(text)
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise ValueError("it is no patch of spkit")
    if tree.get("version") != VERSION:
        raise ValueError(f"format version {tree.get('version')!r}, this kit reads {VERSION}")
    try:
        return Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))[:200] or "as a whole"
        where = where if where.isprintable() else repr(where)
        what = f"the manifest is wrong ({where}): {first['msg']}"
    except RecursionError:
        what = "the manifest is nested too deeply"
    # Raised here, so that it does not hold pydantic's error: that one holds the manifest and this
    # frame in a circle that Python cannot free
    raise ValueError(what)


def _check_texts(tree: JsonValue) -> None:
    if isinstance(tree, float) and not isfinite(tree):  # JSON can write 1e999
        raise ValueError("a number that is not finite")
    if isinstance(tree, str):
        if len(tree) > LONGEST_TEXT:
            raise ValueError("a text that is too long")
        _printable(tree)
    for part in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        _check_texts(part)
    if isinstance(tree, dict):
        for key in tree:
            _check_texts(key)


def wrong_tensor(path, name: str, what) -> SpkitError:
    """The error about one tensor of a patch file."""
    return SpkitError(f"{path}, tensor {name!r}: {what}")
