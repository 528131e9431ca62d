"""What is installed and what would run."""

import importlib.metadata
import platform

import torch

EXTRAS = {
    "triton": "triton",
    "dali": "nvidia-dali-cuda130",
    "nvimgcodec": "nvidia-nvimgcodec-cu13",
    "hf": "datasets",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
}


def info() -> None:
    """Print versions, devices, kernel implementations, methods and optional packages."""
    import fastmim_kernels

    from fastmim import __version__
    from fastmim.device import cpu_capability, default_precision
    from fastmim.methods.base import available

    print(f"fastmim {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    for package in ("deepspeed", "numpy", "pillow", "safetensors"):
        print(f"  {package} {_version(package) or 'missing'}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            print(f"device cuda:{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB, sm_{p.major}{p.minor}")
    else:
        print(f"device cpu: {torch.get_num_threads()} threads, {cpu_capability()}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print("precision {} ({})".format(*default_precision(device)))
    print("kernels:")
    for name, (is_available, reason) in fastmim_kernels.backends().items():
        print(f"  {name}: {'available' if is_available else 'not available'}: {reason}")
    for op, state in fastmim_kernels.states().items():
        print(f"    {op}: {state}")
    print(f"methods: {', '.join(available())}")
    print("optional packages:")
    for extra, package in EXTRAS.items():
        print(f"  {package} {_version(package) or 'missing: pip install ' + repr(f'fastmim[{extra}]')}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
