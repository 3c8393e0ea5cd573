"""Datasheet figures of GPUs, and efficiencies: the fractions of these figures that kernels reach, with sources."""

import msgspec

from loraserve.cost.profile import Efficiency


class Hardware(msgspec.Struct, frozen=True, kw_only=True):
    """Datasheet figures of one GPU and its links. ``name`` is the driver's name of the GPU.

    ``architecture`` selects efficiencies. ``bf16_flops`` are dense FLOPs per second. ``host_bytes_per_s`` is the rate
    of the PCIe link in one direction. ``nic_bytes_per_s`` is the network rate per GPU in NVIDIA's eight-GPU system.
    """

    name: str
    architecture: str
    hbm_bytes: float
    hbm_bytes_per_s: float
    bf16_flops: float
    host_bytes_per_s: float
    nic_bytes_per_s: float


# Source: NVIDIA's datasheets of the SXM GPUs. Per GPU, DGX A100 has 200 Gb/s of network, DGX H100 and H200 400 Gb/s.
HARDWARE: dict[str, Hardware] = {
    "a100-80gb": Hardware(
        name="NVIDIA A100-SXM4-80GB",
        architecture="ampere",
        hbm_bytes=80e9,
        hbm_bytes_per_s=2.039e12,
        bf16_flops=312e12,
        host_bytes_per_s=32e9,
        nic_bytes_per_s=25e9,
    ),
    "a100-40gb": Hardware(
        name="NVIDIA A100-SXM4-40GB",
        architecture="ampere",
        hbm_bytes=40e9,
        hbm_bytes_per_s=1.555e12,
        bf16_flops=312e12,
        host_bytes_per_s=32e9,
        nic_bytes_per_s=25e9,
    ),
    "h100": Hardware(
        name="NVIDIA H100 80GB HBM3",
        architecture="hopper",
        hbm_bytes=80e9,
        hbm_bytes_per_s=3.35e12,
        bf16_flops=989e12,
        host_bytes_per_s=64e9,
        nic_bytes_per_s=50e9,
    ),
    "h200": Hardware(
        name="NVIDIA H200",
        architecture="hopper",
        hbm_bytes=141e9,
        hbm_bytes_per_s=4.8e12,
        bf16_flops=989e12,
        host_bytes_per_s=64e9,
        nic_bytes_per_s=50e9,
    ),
}

_STREAMING = {
    "ampere": Efficiency(
        value=0.84,
        source="published: 1,219 to 1,225 of 1,448 GiB/s of an A100-SXM4-40GB (GPUInspector.jl, docs/src/examples/"
        "data_bandwidth.md, github.com/pc2/GPUInspector.jl)",
    ),
    "hopper": Efficiency(
        value=0.896,
        source="measured on an H200, 4.3 of 4.8 TB/s, while the design's facts were gathered; not recorded in this "
        "repository",
    ),
}

_ATTENTION = {
    "ampere": Efficiency(
        value=0.5,
        source="published: 50% to 73% of an A100's peak, the low end (Dao, FlashAttention-2, arXiv:2307.08691)",
    ),
    "hopper": Efficiency(
        value=0.35,
        source="published: FlashAttention-2 reaches 35% of an H100's peak (Shah et al., FlashAttention-3, "
        "arXiv:2407.08608, abstract)",
    ),
}

_MFU = Efficiency(
    value=0.462,
    source="published: model FLOPs utilization of PaLM 540B in training, a figure on TPU v4 and of no GPU (Chowdhery "
    "et al., arXiv:2204.02311); taken as the low end: 72% on an A100 (FlashAttention-2, arXiv:2307.08691), 76% of "
    "prefill on TPU v4 (Pope et al., arXiv:2211.05102)",
)


def find_efficiencies(hardware: Hardware) -> dict[str, Efficiency]:
    """Return the efficiencies for ``derive_profile``, by name.

    LoRA kernels without published figures are assumed to be as efficient as the base model's kernels. This favours
    systems with ``padded`` LoRA kernels (S-LoRA, Punica, vLLM), some of which are reported to be less efficient.
    """
    streaming = _STREAMING[hardware.architecture]
    return {
        "memory_bandwidth": streaming,
        "exact_lora_bandwidth": _as("memory_bandwidth: slabs are contiguous", streaming),
        "padded_lora_bandwidth": _as(
            "memory_bandwidth, the peers' best case: each token reads its adapter (BGMV; S-LoRA, arXiv:2311.03285); "
            "its expand kernel is reported to reach less (github.com/punica-ai/punica, issue 47)",
            streaming,
        ),
        "linear_flops": _MFU,
        "attention_flops": _ATTENTION[hardware.architecture],
        "exact_lora_flops": _as("linear_flops", _MFU),
        "padded_lora_flops": _as("linear_flops, the peers' best case", _MFU),
        "link": Efficiency(
            value=0.775,
            source="published: 24.8 of 32 GB/s, host to an A100 (nvbandwidth, forums.developer.nvidia.com/t/352186); "
            "the low end: 55.6 of 64 GB/s over PCIe 5 (NVIDIA's blog on nvbandwidth)",
        ),
        "digest_bytes_per_s": Efficiency(
            value=4.4e9,
            source="measured on 2026-12-01 on an AMD EPYC (Zen 4) at 2.6 GHz with two virtual cores, busy with other "
            "work: BLAKE3 (package blake3 1.0.11) of 20 MiB, the size of a layer of the largest Llama-3-8B slab, in "
            "updates of 1 to 20 MiB: 4.1 to 4.9 GB for each second of CPU in one thread, 4.1 to 4.6 in each of two",
        ),
        "digest_threads": Efficiency(
            value=8,
            source="an assumption: what engine.digest_threads = 0 gives where each GPU has 16 hardware threads, each "
            "as fast as one alone. NVIDIA's datasheets: DGX A100 has 128 cores for 8 GPUs, DGX H200 has 112",
        ),
        "load_base_s": Efficiency(
            value=0.005, source="an allowance, not measured: lease, read, install and release over the bus"
        ),
    }


def _as(why: str, other: Efficiency) -> Efficiency:
    return Efficiency(value=other.value, source=f"as {why}")
