// CUTLASS's INT8 GEMM for Hopper as a peer of the benchmarks: D = bf16((A · Bᵀ) · scale_m · scale_n).
//
// One configuration per translation unit, so that they compile side by side: PEER_ID (0, 1, …), PEER_TILE and PEER_CLUSTER
// (e.g. 128,256,128 and 2,1,1), PEER_SCHEDULE (Cooperative, Pingpong, or empty for CUTLASS's plain warp-specialised
// kernel). With CUTLASS_ENABLE_GDC_FOR_SM90 the kernels may overlap their successors (`overlap`).
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>
#include <cutlass/util/packed_stride.hpp>

namespace {

using namespace cute;  // its short names are what every CUTLASS example is written in
namespace fusion = cutlass::epilogue::fusion;

template <int... Is>
using Sizes = Shape<Int<Is>...>;
using Tile = Sizes<PEER_TILE>;
using Cluster = Sizes<PEER_CLUSTER>;
#define PEER_JOIN_(A, B) A##B
#define PEER_JOIN(A, B) PEER_JOIN_(A, B)
using MainloopSchedule = cutlass::gemm::PEER_JOIN(KernelTmaWarpSpecialized, PEER_SCHEDULE);
// The pingpong kernel has the plain epilogue: each of its consumer warpgroups owns a whole tile.
constexpr bool kCooperative = is_same_v<MainloopSchedule, cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
using EpilogueSchedule = conditional_t<kCooperative, cutlass::epilogue::TmaWarpSpecializedCooperative,
                                       cutlass::epilogue::TmaWarpSpecialized>;

// (float(sum) · scale_m[m]) · scale_n[n], rounded once: hwkern's formula, so the results have the same bits.
constexpr auto kRound = cutlass::FloatRoundStyle::round_to_nearest;
template <class Out>
using Multiply = fusion::Sm90Compute<cutlass::multiplies, Out, float, kRound>;
using ScaleM = fusion::Sm90ColBroadcast<0, Tile, float>;
using ScaleN = fusion::Sm90RowBroadcast<0, Tile, float>;
using Rows = fusion::Sm90EVT<Multiply<float>, ScaleM, fusion::Sm90AccFetch>;
using Scaled = fusion::Sm90EVT<Multiply<cutlass::bfloat16_t>, ScaleN, Rows>;

using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto,
    int32_t, float, void, cutlass::layout::RowMajor, 8, cutlass::bfloat16_t, cutlass::layout::RowMajor, 8,
    EpilogueSchedule, Scaled>::CollectiveOp;
using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, int8_t, cutlass::layout::RowMajor, 16, int8_t,
    cutlass::layout::ColumnMajor, 16, int32_t, Tile, Cluster,
    cutlass::gemm::collective::StageCountAutoCarveout<int(sizeof(typename Epilogue::SharedStorage))>,
    MainloopSchedule>::CollectiveOp;
using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue>;
using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

}  // namespace

// a [M, K] and b [N, K] int8, scale_m [M] and scale_n [N] float32, d [M, N] bfloat16, all dense; K % 16 == N % 8 == 0.
// swizzle: tiles of one column of the raster, 1 … 8. Returns 0, or -1 - cutlass::Status.
extern "C" int PEER_JOIN(cutlass_int8_, PEER_ID)(const void* a, const void* b, const float* scale_m,
                                                 const float* scale_n, void* d, int m, int n, int k, int swizzle,
                                                 int overlap, void* stream) {
  const auto stride_a = cutlass::make_cute_packed_stride(typename Kernel::StrideA{}, make_shape(m, k, 1));
  const auto stride_b = cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, make_shape(n, k, 1));
  const auto stride_d = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, make_shape(m, n, 1));
  typename Gemm::Arguments arguments{cutlass::gemm::GemmUniversalMode::kGemm,
                                     {m, n, k, 1},
                                     {static_cast<const int8_t*>(a), stride_a, static_cast<const int8_t*>(b), stride_b},
                                     {{}, nullptr, {}, static_cast<cutlass::bfloat16_t*>(d), stride_d}};
  typename Rows::Arguments rows{{scale_m}, {}, {}};
  arguments.epilogue.thread = typename Scaled::Arguments{{scale_n}, rows, {}};
  arguments.scheduler.max_swizzle_size = swizzle;
  Gemm gemm;
  cutlass::Status status = Gemm::can_implement(arguments);
  // None of these configurations needs a workspace.
  if (status == cutlass::Status::kSuccess && Gemm::get_workspace_size(arguments) != 0)
    status = cutlass::Status::kErrorWorkspaceNull;
  const cudaStream_t where = static_cast<cudaStream_t>(stream);
  if (status == cutlass::Status::kSuccess) status = gemm.initialize(arguments, nullptr, where);
  if (status == cutlass::Status::kSuccess) status = gemm.run(where, nullptr, overlap != 0);
  return status == cutlass::Status::kSuccess ? 0 : -1 - static_cast<int>(status);
}
