"""csrc/math is one definition for host and device: where there is an nvcc, it must compile as device code."""

import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

MATH = Path(__file__).resolve().parent.parent / "csrc" / "math"

# Uses every header, the noise, and value and gradient of every activation in the list, for both scalar types.
SOURCE = """
{includes}

using namespace fusednorm::math;

template <class V, class... Activations>
__device__ V all(V z, V g, const Parameters<V>& p, List<Activations...>) {{
  V sum = 0;
  ((sum += Activations::value(z, p) + Activations::gradient(z, g, p)), ...);
  return sum;
}}

template <class V>
__global__ void apply(const V* x, const V* g, V* y, V* moments, int64_t seed, double p, Parameters<V> parameters) {{
  const int64_t r = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
  const uint32_t threshold = keep_threshold(p);
  const bool kept = draw16(split_seed(seed), r, blockIdx.y) < threshold;
  const V z = normalize(x[r], V(1), V(2), V(3));
  y[r] = kept ? V(keep_scale(threshold)) * all(z, g[r], parameters, Activations{{}}) : V(0);
  const Moments<double> merged = merge(Moments<double>{{1, double(x[r]), 0}}, Moments<double>{{1, double(g[r]), 0}});
  float uniform[8], gaussian[8];
  uniform8(split_seed(seed), r, blockIdx.y, 0.5f, uniform);
  gaussian8(split_seed(seed), r, blockIdx.y, 0.5f, gaussian);
  for (int i = 0; i < 8; ++i) y[r] += uniform[i] * gaussian[i];
  y[r] += Prelu::weight_gradient(z, g[r]);
  const InputGradient coefficients = input_gradient(2.0, 1.0, 3.0, 4.0, 5.0);
  moments[r] = V(merged.mean) + apply_input_gradient(z, z, V(coefficients.a), V(coefficients.b), V(coefficients.c));
}}

template __global__ void apply(const float*, const float*, float*, float*, int64_t, double, Parameters<float>);
template __global__ void apply(const double*, const double*, double*, double*, int64_t, double, Parameters<double>);
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.skipif(not MATH.is_dir(), reason="needs the sources")
@pytest.mark.parametrize("standard", ["c++17"])
def test_compiles_as_device_code(standard, tmp_path):
    headers = sorted(MATH.glob("*.h"))
    assert headers
    source = tmp_path / "math.cu"
    source.write_text(SOURCE.format(includes="\n".join(f'#include "{header.name}"' for header in headers)))
    command = ["nvcc", "-arch=sm_80", f"-std={standard}", "--Werror", "cross-execution-space-call", "-I", str(MATH)]
    child = subprocess.run(
        [*command, "-cubin", "-o", str(tmp_path / "math.cubin"), str(source)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr[-4000:]


@pytest.mark.skipif(not MATH.is_dir(), reason="needs the sources")
def test_knows_no_tensor():
    """Nothing of torch, the CPU backend or the CUDA runtime is included, which keeps the headers usable by both."""
    allowed = {"math.h", "stdint.h", "string.h", "limits.h", "float.h"} | {header.name for header in MATH.glob("*.h")}
    for header in MATH.glob("*.h"):
        for line in header.read_text().splitlines():
            if line.startswith("#include"):
                assert line.split()[1].strip('<">') in allowed, f"{header.name}: {line}"
