"""The published certification loop of randomized smoothing, as a peer of `benchmarks.smoothing`.

`PYTHON benchmarks/smoothing_peer.py CODE`, with an interpreter that has torch, numpy, scipy and
statsmodels. CODE is the folder `code` of a checkout of github.com/locuslab/smoothing (Cohen,
Rosenfeld and Kolter, ICML 2019), whose `core.py` runs unmodified but for two things: 'cuda' reads
'cpu', and `scipy.stats.binom_test`, which SciPy has dropped, is an alias of its successor.

It answers each line of JSON, {"net", "weights", "images", "batch", "n", "n0", "sigma",
"channels_last"}, with {"cpu_s", "wall_s"} of one call of `Smooth.certify` per image. Weights and
images are .npz files; with "logits": true the answer is the logits of the images instead. As many
threads are used as there are processors that the process may run on.
"""

import functools
import json
import os
import pathlib
import sys
import time

import numpy as np
import scipy.stats
import torch
from torch import nn

if not hasattr(scipy.stats, "binom_test"):
    binom_test = lambda x, n, p: scipy.stats.binomtest(int(x), int(n), p).pvalue  # noqa: E731
    setattr(scipy.stats, "binom_test", binom_test)  # noqa: B010


def smooth_class(code: pathlib.Path):
    """`Smooth` of the published core.py."""
    source = (code / "core.py").read_text().replace("'cuda'", "'cpu'")
    names = {}
    exec(compile(source, str(code / "core.py"), "exec"), names)
    return names["Smooth"]


def mlp() -> nn.Module:
    layers = nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    return nn.Sequential(nn.Flatten(), *layers)


def lenet() -> nn.Module:
    convs = []
    for before, after in ((1, 20), (20, 50)):
        convs += [nn.Conv2d(before, after, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))


def resnet(depth: int) -> nn.Module:
    from archs.cifar_resnet import resnet as published

    return published(depth=depth, num_classes=10)


NETS = {
    "mlp": mlp,
    "lenet": lenet,
    "resnet20": functools.partial(resnet, 20),
    "resnet110": functools.partial(resnet, 110),
}


@functools.cache
def loaded(name: str, path: str, channels_last: bool) -> nn.Module:
    """The net in eval mode with the weights of an .npz file, whose names are those of torch."""
    net = NETS[name]()
    weights = {key: torch.from_numpy(value) for key, value in np.load(path).items()}
    missing, unexpected = net.load_state_dict(weights, strict=False)
    if unexpected or any(not key.endswith("num_batches_tracked") for key in missing):
        raise ValueError(f"the weights do not fit: {missing}, {unexpected}")
    return ChannelsLast(net.eval()) if channels_last else net.eval()


class ChannelsLast(nn.Module):
    """The same net on the layout (b, height, width, channels) in memory."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net.to(memory_format=torch.channels_last)

    def forward(self, x):
        """The logits."""
        return self.net(x.to(memory_format=torch.channels_last))


def answer(request: dict, smooth) -> dict:
    net = loaded(request["net"], request["weights"], request.get("channels_last", False))
    x = torch.from_numpy(np.load(request["images"])["x"].transpose(0, 3, 1, 2).copy())
    if request.get("logits"):
        with torch.no_grad():
            return {"logits": net(x).tolist()}
    smoothed = smooth(net, 10, request["sigma"])
    cpu, wall = time.process_time(), time.perf_counter()
    for image in x:
        smoothed.certify(image, request["n0"], request["n"], 0.001, request["batch"])
    return {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}


def main() -> None:
    code = pathlib.Path(sys.argv[1])
    sys.path.insert(0, str(code))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    smooth = smooth_class(code)
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line), smooth)
        except Exception as error:
            reply = {"error": repr(error)}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
