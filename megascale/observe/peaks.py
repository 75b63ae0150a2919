"""Dense bf16 peaks of devices, the denominator of MFU."""

_PEAK_BF16_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.5,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H200": 989.4,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA GH200 144G HBM3e": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA GB200": 2500.0,
    "NVIDIA L40S": 362.05,
    "NVIDIA GeForce RTX 4090": 165.2,
}


def peak_bf16_flops(device_name: str) -> float | None:
    """Peak of one device in FLOP/s, without sparsity, with fp32 accumulation; None for a device that isn't listed.

    Names are those of `torch.cuda.get_device_name` and are compared whole: a part of a GPU (MIG), a laptop's or a
    market's variant has a similar name and another peak, and no MFU is better than a wrong one.

    Source: NVIDIA's data sheets; where they only give a number with sparsity, half of it.
    """
    tflops = _PEAK_BF16_TFLOPS.get(device_name)
    return None if tflops is None else tflops * 1e12
