// The cost model: predicted microseconds of a config, from the tiles, the operations and the bytes of a problem.
//
// Constants were fitted to times measured on an H100 SXM (Llama-3-8B and BERT-base shapes, cold L2, graph replays):
//   mma.sync rows             45 shapes × 8 configs: the choice is 0.2 % slower than the best in the geometric mean, 6 % at
//                             worst; used before Hopper and after it
//   split-K rows              164 shapes (Llama-3-8B, M 1 … 512, and 768×768), B constant and not: 0.3 %, 5 % at worst; and
//                             25 small ones as the rows were before, with less weight
//   wgmma rows                66 shapes (M 128 … 8192), constant B: the choice, from the split-K rows too, is 0.2 % slower
//                             than the best in the geometric mean, 4 % at worst (4096×768×3072); kNarrow and kBeside later,
//                             to Llama-3-8B's 28 of M 128 … 8192, a GPU that rests between replays: 0.01 %, 0.3 % at worst
// Other GPUs are ranked with the same constants; they were not measured.
#include <algorithm>
#include <cmath>

#include "core/status.h"
#include "gemm/configs.h"
#include "gemm/w8a16.h"

namespace hwkern {

namespace {

constexpr double kCyclesPerUs = 1700;

// Near the crossing of compute and memory time both limits are felt: the fourth root of the sum of fourth powers.
double smooth_max(double a, double b) { return std::sqrt(std::sqrt(a * a * a * a + b * b * b * b)); }

double bytes_moved(int64_t m, int64_t n, int64_t k) { return double(n) * k + double(m) * k + 2.0 * m * n; }

// One block a tile, several on an SM at once.
double predict_mma_sync(const GemmConfig& c, int64_t m, int64_t n, int64_t k, const Device& device) {
  constexpr double kOpsPerCycle = 3180;  // int8 operations of one SM through mma.sync, all its warps busy
  constexpr double kWarpsToFill = 4.71;  // warps that one SM needs for that rate
  constexpr double kCyclesPerBuffer = 263;  // barrier and latency for each BLOCK_K step of a block that runs alone
  constexpr double kL2BytesPerCycle = 34.8;  // operands into one SM
  constexpr double kMemoryBytesPerUs = 2.78e6;
  constexpr double kFixedUs = 1.7;  // first load, epilogue; with overlapping launches
  const double operations = 2.0 * c.block_m * c.block_n * c.block_k;
  const double bytes = double(c.block_m + c.block_n) * c.block_k;
  const int warps = c.warps_m * c.warps_n * c.warps_k;
  // Cycles for one BLOCK_K step: of the SM's throughput, and of one block that has the SM for itself.
  const double shared = std::max(operations / kOpsPerCycle, bytes / kL2BytesPerCycle);
  const double alone = operations / (kOpsPerCycle * std::min(1.0, warps / kWarpsToFill)) + kCyclesPerBuffer;
  // The busiest SM runs its tiles `resident` at a time; the last round may hold fewer.
  const int64_t tiles = ceil_div(m, c.block_m) * ceil_div(n, c.block_n);
  const int64_t on_one_sm = ceil_div(tiles, device.sm_count);
  const int64_t fit = (device.shared_bytes + 1024) / (c.shared_bytes + 1024);  // 1 KB a block is the system's
  const int64_t resident = std::max<int64_t>(1, std::min<int64_t>(c.blocks_per_sm, fit));
  auto round = [&](int64_t blocks) { return blocks == 0 ? 0.0 : std::max(blocks * shared, alone); };
  const double steps = double(ceil_div(k, c.block_k));
  const double cycles = steps * (double(on_one_sm / resident) * round(resident) + round(on_one_sm % resident));
  return smooth_max(kFixedUs + cycles / kCyclesPerUs, kFixedUs + bytes_moved(m, n, k) / kMemoryBytesPerUs);
}

// Operand bytes from L2 into all SMs: each row of tiles takes all of B (once for all blocks of a cluster), each column all
// of A.
double l2_bytes(int64_t rows_of_tiles, int64_t columns_of_tiles, int64_t m, int64_t n, int64_t k) {
  return double(k) * (double(rows_of_tiles) * n + double(columns_of_tiles) * m);
}

// Persistent blocks, one an SM. In ping-pong (four warps a tile) an epilogue runs beside the next tile's main loop.
double predict_wgmma(const GemmConfig& c, int64_t m, int64_t n, int64_t k, const Device& device) {
  constexpr double kMacsPerUs = 7.462e6, kL2BytesPerUs = 12.07e6, kMemoryBytesPerUs = 2.753e6;
  constexpr double kOutBytes = 2.555;  // what an element of D costs, in bytes read
  constexpr double kEpilogueUsPerColumn = 0.00591, kHiddenEpilogue = 0.757;  // the latter in ping-pong
  constexpr double kFixedUs = 2.12;
  constexpr double kPair = 1.169;  // blocks of a cluster wait for each other: longer tiles
  constexpr double kWide = 1.081;  // more than 128 columns a tile, without a cluster
  constexpr double kNarrow = 1.01;  // tiles of two widths: not all blocks have as much as the busiest
  constexpr double kShortUs =
      460;  // over K: a short main loop hides less of the next tile's first loads (0.6 µs at 768)
  // Ping-pong without a cluster asks L2 for more bytes than with one, but L2 serves requests of several SMs for the same
  // ones at once. For K = 4096, 108 was faster than 107 by 0.2 – 1.1 % at 1024 … 4096 rows; at 8192, where the power limit
  // rules, 107 by 0.3 – 0.4 % (but 108 by 0.3 % for N = 4096), at 512 by 1 %. For K = 14336, 103 was faster than both.
  constexpr double kBeside = 0.885;
  const int64_t tiles_m = ceil_div(m, c.block_m * c.cluster), clusters = device.sm_count / c.cluster;
  const int narrow = sm90_narrow(c.id);
  const Sm90Columns columns = sm90_columns(tiles_m, n, clusters, c.block_n, narrow);
  const int64_t tiles_n = columns.wide + columns.narrow;
  const double rounds = double(ceil_div(tiles_m * tiles_n, clusters));
  const double exposed = c.warps_m == 4 ? 1 + (1 - kHiddenEpilogue) * (rounds - 1) : rounds;
  const double loop_us = (c.cluster > 1     ? kPair
                          : c.block_n > 128 ? kWide
                                            : 1) *
                         (columns.narrow > 0 ? kNarrow : 1) * double(columns.most) * c.block_m * c.block_k *
                         double(ceil_div(k, c.block_k)) / kMacsPerUs;
  const double epilogue_us = kEpilogueUsPerColumn * (columns.narrow > 0 ? narrow : c.block_n) * exposed;
  const double memory_us = (double(n) * k + double(m) * k + kOutBytes * double(m) * n) / kMemoryBytesPerUs;
  const bool beside = c.warps_m == 4 && c.cluster == 1 && c.block_n > 128 && tiles_m >= 8 && m < 8192 && n >= 4096 &&
                      k >= 4096 && k <= 8192;
  const double l2_us = (beside ? kBeside : 1) * l2_bytes(tiles_m, tiles_n, m, n, k) / kL2BytesPerUs;
  return kFixedUs + kShortUs / double(k) + smooth_max(smooth_max(memory_us, l2_us), loop_us + epilogue_us);
}

// What a split-K row takes more than the formula below says, fitted with its constants; and what still where B is constant and
// large, by times with scales that come from memory: beside scales in L2 206 took 6.8 µs at 32×4096×4096, and takes 8.3.
constexpr struct {
  int id;
  double us, constant_us = 0;
} kSplitRowUs[] = {{201, -0.91, -0.3}, {206, -0.95, 0.7}, {209, -0.91},     {215, -1.38},      {217, -0.49, -0.45},
                   {218, 0.13},        {219, -1.11},      {222, -0.37},     {223, -0.11},      {224, 0.52},
                   {225, -0.19},       {227, 0.54},       {228, 1.07},      {230, -0.18},      {231, -0.22},
                   {232, 0.38, -0.25}, {233, -0.37},      {234, -0.44},     {235, -0.70},      {236, 0.95},
                   {237, -0.36},       {238, -0.21},      {239, -0.22},     {240, -0.19},      {241, 0.09},
                   {242, 0.07},        {243, 0.21},       {245, -0.44},     {246, -0.77, 0.4}, {247, -1.00},
                   {248, 1.04},        {249, -0.80, 0.6}, {250, 1.6, -1.6}, {254, 1.5, -3.2},  {256, 1.6}};

double split_row_us(int id, bool large_constant) {
  for (const auto& row : kSplitRowUs)
    if (row.id == id) return row.us + (large_constant ? row.constant_us : 0);
  return 0;
}

// One block a tile and slice of K, several on an SM at once. Constant weights of the next launch arrive in this one's time.
double predict_split(const GemmConfig& c, int64_t m, int64_t n, int64_t k, const Device& device, bool b_is_constant) {
  constexpr double kFixedUs = 2.373;  // from the preceding kernel's end to the first wgmma, and the epilogue
  constexpr double kMemoryBytesPerUs = 3.084e6, kL2BytesPerUs = 14.42e6;  // L2: into all SMs
  constexpr double kOutBytes = 3.481;  // what an element of D costs, in bytes read
  constexpr double kMacsPerUs = 6.935e6, kSmBytesPerUs = 130.2e3, kSplitSmBytesPerUs = 99.54e3;  // of one SM
  constexpr double kLatencyUs = 1.467;  // of a load: a block that runs alone takes so long for STAGES steps
  constexpr double kBlockUs = 0.03383, kRoundUs = 2.08;  // start and end of a block; of all that run at once
  constexpr double kOutUs = 0.004525, kExchangeUs = 0.1454;  // of 8192 sums: finished, received
  constexpr double kTokenTilesUs = 0.5667, kSplitTokenTilesUs = 1.194;  // more than one tile of tokens
  // Weights that are not constant are asked for after the wait: with slots for all blocks of the next launch, that much
  // (kWait) of the time of their first loads is lost, and kPartlyUs with slots for some of them.
  constexpr double kWait = 0.319, kPartlyUs = 0.6646, kSplitPartlyUs = 1.936;
  const int64_t tiles_m = ceil_div(m, c.block_m), blocks = tiles_m * ceil_div(n, c.block_n) * c.split_k;
  const int64_t slots = int64_t{device.sm_count} * c.blocks_per_sm;
  // Clusters of 4 leave SMs of a GPC over: 96 of them did not run at once on 132 SMs with 3 blocks each, 64 did.
  const int64_t at_once = c.split_k < 4 ? slots : slots - slots / 16;
  const double on_one_sm = double(ceil_div(blocks, device.sm_count)), rounds = double(ceil_div(blocks, at_once));
  const double steps = double(ceil_div(ceil_div(k, c.block_k), c.split_k)), tokens = double(ceil_div(m, tiles_m));
  const double macs = double(c.block_m) * c.block_n * c.block_k * steps;
  const double bytes = (tokens + c.block_n) * c.block_k * steps;
  const double block_us = std::max(bytes / (c.split_k > 1 ? kSplitSmBytesPerUs : kSmBytesPerUs), macs / kMacsPerUs);
  const double sm_us = std::max(on_one_sm * (block_us + kBlockUs * c.split_k), rounds * steps * kLatencyUs / c.stages);
  const double memory_us = (double(n) * k + double(m) * k + kOutBytes * double(m) * n) / kMemoryBytesPerUs;
  const double stream_us =
      smooth_max(smooth_max(memory_us, l2_bytes(tiles_m, ceil_div(n, c.block_n), m, n, k) / kL2BytesPerUs), sm_us);
  const double share = double(c.split_k - 1) / c.split_k;
  const double out_us = (kOutUs * tokens + kExchangeUs * share * c.block_m) * c.block_n / 8192 *
                        std::min<double>(on_one_sm, c.blocks_per_sm);
  const double first_us =
      double(blocks) * c.block_n * c.block_k * std::min<double>(c.stages, steps) / kMemoryBytesPerUs;
  const bool next_fits = 2 * blocks <= slots;
  const double partly_us = 1.1 * double(blocks) >= double(slots) ? 0 : c.split_k > 1 ? kSplitPartlyUs : kPartlyUs;
  const double waiting_us = b_is_constant ? 0 : next_fits ? kWait * first_us : partly_us;
  const double busy = std::min(1.0, double(blocks) / device.sm_count);
  const double tiles_us = tiles_m == 1 ? 0 : busy * (c.split_k > 1 ? kSplitTokenTilesUs : kTokenTilesUs);
  const double rounds_us = sm90_split_persistent(c.id) ? 0 : kRoundUs * (rounds - 1);
  return kFixedUs + stream_us + out_us + rounds_us + waiting_us + tiles_us +
         split_row_us(c.id, b_is_constant && is_large(n, k));
}

}  // namespace

int linear_sm90_groups(const GemmConfig& c, int64_t m, int64_t n, int sm_count) {
  const int64_t rows = ceil_div(m, c.block_m), tiles = ceil_div(n, c.block_n);
  int64_t best = c.cluster;
  double best_cost = 0;
  for (int64_t groups = c.cluster; groups < tiles + c.cluster; groups += c.cluster) {
    // Tiles that the busiest SM multiplies; its rows, in a row of tiles' time.
    const double cost = double(ceil_div(rows * groups, sm_count)) * (double(ceil_div(tiles, groups)) + 1.0);
    if (groups == c.cluster || cost < best_cost) best = groups, best_cost = cost;
  }
  return static_cast<int>(best);
}

// Where one launch was faster than two on an H100 SXM, mostly by 4 – 9 %. By rules and not by predicted times, because such
// a difference is within what the model is wrong by. Measured with bfloat16 in and out, one launch / two, µs:
//   400   64 × 64     128×3072×768 4.8 / 5.2, 256×1536×384 4.0 / 4.5, 512×384×384 3.9 / 4.2; but with fewer than 24 blocks,
//                     64×768×768, 4.3 / 3.8, and with more than one an SM, 256×3072×768, 6.1 / 5.6
//                     and at 512×768×768, 5.0 / 4.8
//   401   128 × 128   4096×3072×768 24.0 / 26.6; but with 384 columns a block, 2048×3072×768,
//                     15.9 / 14.0, with 576, 4096×2304×768, 21.7 / 20.0, and with 96 blocks, 3000×3072×768, 23.8 / 21.5
//   406   64 × 192    384 columns a block, 4096×768×768 10.8 / 12.0; but with 192 columns, 2048×768×768, 8.4 / 7.4, with 768,
//                     2048×3072×768, 16.5 / 15.5, and where rows are few, 1024×3072×768, 11.3 / 10.0
static int choose_one_launch(int64_t m, int64_t n, int64_t k, const Device& device) {
  const GemmConfig &small = *gemm_config(400), &square = *gemm_config(401), &low = *gemm_config(406);
  if (m < small.block_m || m > 8192 || n < 1 || k < 1 || k > small.max_k || !gemm_runs_on(square, device)) return -1;
  if (m <= 512) {
    const int64_t blocks = ceil_div(m, small.block_m) * ceil_div(n, small.block_n);
    if (blocks < 24 || 4 * blocks > 3 * device.sm_count) return -1;
    return m > 256 && k > 640 ? -1 : small.id;
  }
  // Columns that a block multiplies, where one wave of blocks fills the GPU; else 0.
  auto columns = [&](const GemmConfig& c) -> int64_t {
    const int64_t groups = linear_sm90_groups(c, m, n, device.sm_count), wave = ceil_div(m, c.block_m) * groups;
    const bool fills = wave <= device.sm_count && 100 * wave >= 93 * device.sm_count;
    return fills ? ceil_div(ceil_div(n, c.block_n), groups) * c.block_n : 0;
  };
  if (k <= 640) return -1;  // not measured since the GEMM of two launches got faster
  if (const int64_t in_square = columns(square); in_square > 640 && in_square <= 1024) return square.id;
  return m > 1024 && columns(low) == 384 ? low.id : -1;
}

// Whether the blocks are at most one an SM, and are so on most of the SMs.
static bool fills_one_wave(const GemmConfig& c, int64_t m, int64_t n, const Device& device) {
  const int64_t blocks = ceil_div(m, c.block_m) * ceil_div(n, c.block_n) * c.split_k;
  return gemm_runs_on(c, device) && blocks <= device.sm_count && 10 * blocks >= 7 * device.sm_count;
}

// The GEMM after quantize: gemm_choose's, but where tiles of 128 tokens are one wave of blocks for most of the SMs, they
// were faster in a layer, and where few columns leave tiles of two widths little to gain, consumers that share a tile were.
// Those / gemm_choose's, µs: 222 / 209 1024×768×768 5.7 / 6.1, 223 / 225 512×3072×768 7.1 / 7.6, 223 / 228 2048×768×3072
// 16.8 / 17.6, 106 / 107 4096×768×3072 28.9 / 30.2. So were blocks that have an SM alone instead of two an SM, which may start
// late (linear_product_waits), 230 / 209 512×768×768 4.9 / 5.1, 234 / 219 512×2304×768 6.5 / 7.0, and fewer blocks of 128 tokens
// split in two, 232 / 217 512×768×3072 8.9 / 9.3. The GEMMs that start beside quantize:
//   410   128 × 128   1024×3072×768 9.7 / 10.5 (106), 2048×768×3072 16.4 / 17.0 (223); but 1024×2304×768 9.4 / 9.0 (225),
//                     2048×768×768 7.9 / 7.1 (219), 4096×768×768 11.8 / 11.4 (106), 2048×3072×768 15.6 / 14.9 (108)
//   411   128 × 192   one wave of blocks and a long K, 4096×768×3072 26.8 / 27.5 (106); but 4096×2304×768 21.4 / 20.6 (108),
//                     4096×3072×768 27.1 / 25.2 (401)
static int choose_after_quantize(int64_t m, int64_t n, int64_t k, const Device& device) {
  const int id = gemm_choose(m, n, k, device, /*b_is_constant=*/true);
  if (m < 512 || n > 3072 || k <= 640 || k > 3072) return id;
  if (id == 107 && n <= 768) return k > 2048 && ceil_div(m, 128) * ceil_div(n, 192) <= device.sm_count ? 411 : 106;
  if ((id == 106 && m <= 1024) || (id == 223 && m >= 2048 && k > 2048)) return 410;
  auto is_wave = [&](int other) { return fills_one_wave(*gemm_config(other), m, n, device); };
  if (id == 209) return is_wave(222) ? 222 : is_wave(230) ? 230 : id;
  if (id == 217 && k > 2048) return is_wave(232) ? 232 : id;
  if (id == 219 && m == 512) return is_wave(234) ? 234 : id;
  return (id == 104 || id == 225 || id == 228) && is_wave(223) ? 223 : id;
}

int linear_choose(int64_t m, int64_t n, int64_t k, const Device& device) {
  const int one_launch = choose_one_launch(m, n, k, device);
  return one_launch >= 0 ? one_launch : choose_after_quantize(m, n, k, device);
}

// Measured with constant weights, started late / early, µs. One block an SM for most of them, K not split, is better
// started late:
//   223   512×3072×768 7.4 / 7.7, 256×6144×4096 17.7 / 18.1, 512×4096×4096 19.3 / 19.4
//   225   1024×2304×768 8.6 / 9.2
//   230   512×768×768 4.9 / 5.1
//   234   512×2304×768 6.5 / 7.1
//   222   1024×768×3072 11.7 / 12.1, 256×4096×4096 12.8 / 13.0; but with 48 blocks, 512×768×768, 5.2 / 5.1, and in two
//         rounds, 2048×768×768, 10.6 / 10.4
// and so is the GEMM of few rows of a very long K, 4096×14336: M = 1 23.0 / 24.1, M = 16 24.6 / 26.4, M = 64 25.6 / 25.7. Others
// are not: 217 64×4096×4096 10.7 / 8.8, 512×768×3072 9.7 / 9.3, 219 2048×768×768 8.6 / 7.4, 410 1024×3072×768 10.9 / 10.0.
bool linear_product_waits(const GemmConfig& c, int64_t m, int64_t n, int64_t k, const Device& device) {
  if (!is_sm90_split(c.id)) return false;
  if (m <= 64 && k > 8192) return true;
  return m >= 256 && c.split_k == 1 && c.blocks_per_sm == 1 && fills_one_wave(c, m, n, device);
}

double gemm_predict_us(const GemmConfig& config, int64_t m, int64_t n, int64_t k, const Device& device,
                       bool b_is_constant) {
  if (m < 1 || n < 1 || k < 1) return 0;
  if (config.scheme == Scheme::kW8A16) return predict_w8a16(config, m, n, k, device);
  if (is_sm90_split(config.id)) return predict_split(config, m, n, k, device, b_is_constant);
  return config.id >= kFirstSm90Id ? predict_wgmma(config, m, n, k, device) : predict_mma_sync(config, m, n, k, device);
}

}  // namespace hwkern
