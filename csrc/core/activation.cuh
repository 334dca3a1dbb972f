// hwkern.h's Activation in float32, as every epilogue applies it.
#pragma once

#include "hwkern.h"

namespace hwkern {

// NOTE: with the GPU's own erf, tanh and exp, so within 4 float32 ulp of the exact value and not in every bit of it.
__device__ __forceinline__ float activate(Activation activation, float y) {
  switch (activation) {
    case Activation::kRelu: return y < 0.0f ? 0.0f : y;  // not fmaxf: NaN stays NaN
    case Activation::kGelu: return 0.5f * y * (1.0f + erff(y * 0.70710678118654752f));
    case Activation::kGeluTanh: return 0.5f * y * (1.0f + tanhf(0.79788456080286536f * (y + 0.044715f * y * y * y)));
    case Activation::kSilu: return y / (1.0f + expf(-y));
    default: return y;
  }
}

}  // namespace hwkern
