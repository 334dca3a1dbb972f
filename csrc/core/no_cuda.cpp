// What a build without CUDA kernels (HWKERN_CUDA=OFF) answers in their place. Host code stays the same.
#include "attention/attention.h"
#include "core/device.h"
#include "core/status.h"
#include "gemm/configs.h"
#include "gemm/w8a16.h"
#include "quant/kernels.h"

namespace hwkern {

constexpr Status kNoCuda{StatusCode::kNotCompiled,
                         "this hwkern was built without CUDA kernels (HWKERN_CUDA=OFF): install a build with them"};

int device_count(std::string* message) {
  *message = kNoCuda.what;
  return 0;
}
void driver_version(int* driver, int* runtime) { *driver = *runtime = 0; }
Status device_properties(int, DeviceProperties*) { return kNoCuda; }
Status current_device(Device*) { return kNoCuda; }
Status launch_gemm_sm80(const Gemm&, int, int, Stream) { return kNoCuda; }
Status launch_gemm_sm90(const Gemm&, int, int, Stream) { return kNoCuda; }
Status launch_gemm_sm90_split(const Gemm&, int, int, Stream) { return kNoCuda; }
Status launch_linear_sm90(const Linear&, const GemmConfig&, int, Stream) { return kNoCuda; }
Status launch_linear_beside_sm90(const Gemm&, int, int, Stream) { return kNoCuda; }
Status launch_w8a16(const WeightOnlyLinear&, int, const Device&, Stream) { return kNoCuda; }
Status launch_quantize_per_token(const Quantize&, bool, Stream) { return kNoCuda; }
Status launch_quantize_static(const Quantize&, ScaleAxis, Stream) { return kNoCuda; }
Status launch_dequantize(const Dequantize&, ScaleAxis, Stream) { return kNoCuda; }
Status launch_norm_quantize(const NormQuantize&, const Device&, Stream) { return kNoCuda; }
Status launch_activation_quantize(const ActivationQuantize&, void*, const Device&, Stream) { return kNoCuda; }
Status launch_embedding(const Embedding&, const Device&, Stream) { return kNoCuda; }
Status launch_attention(const Attention&, void*, const Device&, Stream) { return kNoCuda; }

}  // namespace hwkern
