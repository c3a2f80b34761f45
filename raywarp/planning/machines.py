"""Clusters that are named rather than asked: `raywarp plan --cluster 2x8xH100`."""

import difflib
import re
from dataclasses import dataclass

from raywarp.cluster.node_report import NodeReport
from raywarp.cluster.resources import Nodes
from raywarp.config.schema import ConfigError

CPUS_PER_GPU = 8  # assumed of a named node
_FORM = re.compile(r"(?:(\d+)x)?(?:(\d+)x)?([A-Za-z][\w-]*)")
_EXAMPLE = "write NODESxGPUSxNAME, for example 8xH100, 2x8xA100 or 1x8xH100,4x16xCPU"


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet.

    Attributes:
        memory: in GiB.
        half: 10^12 dense floating-point operations a second in 16 bits.
        single: the same in float32, without TF32, as torch computes by default.
        bandwidth: 10^12 bytes a second between its memory and its cores.
    """

    memory: float
    half: float
    single: float
    bandwidth: float

    @property
    def bytes(self) -> int:
        return int(self.memory * 2**30)

    def flops(self, dtype: str) -> float:
        """Return the floating-point operations a second in a dtype."""
        return (self.single if dtype == "float32" else self.half) * 1e12


GPUS = {
    "T4": Gpu(15, 65, 8.1, 0.32),
    "V100": Gpu(16, 125, 15.7, 0.9),
    "V100-32": Gpu(32, 125, 15.7, 0.9),
    "A10": Gpu(22, 125, 31.2, 0.6),
    "A10G": Gpu(22, 70, 35, 0.6),
    "L4": Gpu(22, 121, 30.3, 0.3),
    "RTX3090": Gpu(24, 71, 35.6, 0.94),
    "RTX4090": Gpu(24, 165, 82.6, 1.01),
    "RTX5090": Gpu(32, 209, 104.8, 1.79),
    "A40": Gpu(45, 150, 37.4, 0.7),
    "A6000": Gpu(48, 155, 38.7, 0.77),
    "L40": Gpu(45, 181, 90.5, 0.86),
    "L40S": Gpu(45, 362, 91.6, 0.86),
    "A100": Gpu(80, 312, 19.5, 2.0),
    "A100-40": Gpu(40, 312, 19.5, 1.55),
    "A100-80": Gpu(80, 312, 19.5, 2.0),
    "H100": Gpu(80, 989, 67, 3.35),
    "H200": Gpu(141, 989, 67, 4.8),
    "B200": Gpu(179, 2250, 80, 7.7),
    "MI300X": Gpu(192, 1307, 163, 5.3),
}


@dataclass(frozen=True)
class Machines:
    """The nodes of a named cluster.

    Attributes:
        nodes: their GPUs and CPUs.
        reports: what each node would report of itself; no versions, and no host memory.
        name: of the GPU with the smallest memory, as in GPUS; "" without GPUs.
    """

    nodes: Nodes
    reports: list[NodeReport]
    name: str

    @property
    def gpu(self) -> Gpu | None:
        return GPUS.get(self.name)


def named_cluster(text: str) -> Machines:
    """Return the nodes that a text such as 2x8xH100 names: 2 nodes with 8 H100 each.

    8xH100 is one node. Kinds of nodes are separated by commas; 4x16xCPU is 4 nodes of 16 cores.

    Raises:
        ConfigError: the text has another form, or no such GPU is known.
    """
    whole: list[dict[str, float]] = []
    reports: list[NodeReport] = []
    names: list[str] = []
    for part in re.split(r"\s*,\s*", text.strip()):
        count, each, name = _read(part, text)
        if name == "CPU":
            node = {"CPU": float(each)}
        else:
            names.append(name)
            node = {"CPU": float(CPUS_PER_GPU * each), "GPU": float(each)}
            node[f"accelerator_type:{name}"] = 1.0
        memory = (GPUS[name].bytes,) * each if name in GPUS else ()
        whole += [node] * count
        reports += [
            NodeReport(f"{len(reports) + n} ({each} x {name})", {}, 0, memory)
            for n in range(1, count + 1)
        ]
    smallest = min(names, key=lambda name: GPUS[name].memory, default="")
    return Machines(Nodes.empty(whole), reports, smallest)


def _read(part: str, text: str) -> tuple[int, int, str]:
    """Return nodes, GPUs (or cores) of each, and the GPU's name as in GPUS."""
    found = _FORM.fullmatch(part)
    if not found:
        raise ConfigError(f"--cluster {text}: {part or 'nothing'} names no nodes; {_EXAMPLE}")
    first, second, name = found.groups()
    count, each = (int(first or 1), int(second)) if second else (1, int(first or 1))
    if not (count and each):
        raise ConfigError(f"--cluster {text}: {part} has no GPUs; {_EXAMPLE}")
    known = {key.replace("-", "").upper(): key for key in (*GPUS, "CPU")}
    asked = re.sub(r"^(NVIDIA|AMD|TESLA|GEFORCE)|[-_]|GI?B$", "", name.upper())
    if asked not in known:
        near = difflib.get_close_matches(asked, known, n=1)
        hint = f"did you mean {known[near[0]]}? " if near else ""
        raise ConfigError(
            f"--cluster {text}: no GPU {name} is known; {hint}known are {', '.join(GPUS)}, and CPU"
            " for nodes without GPUs"
        )
    return count, each, known[asked]
