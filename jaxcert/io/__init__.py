"""Files of others: nets in ONNX, property files of the verification competition."""

from jaxcert.io import onnx as onnx
from jaxcert.io import vnnlib as vnnlib
from jaxcert.io.onnx import OnnxModel as OnnxModel
