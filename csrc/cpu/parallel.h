// Rows over the threads of the OpenMP runtime that the process has loaded.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>

#include "core/status.h"

// CMake sets HWKERN_CPU_CLONES where the compiler and the C library can choose a version of a function at load time.
#if HWKERN_CPU_CLONES
#define HWKERN_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define HWKERN_CLONES
#endif

namespace hwkern::cpu {

// libgomp's entry point, which Clang's and Intel's runtimes have too: run(data) on up to `threads` threads.
using Parallel = void (*)(void (*run)(void*), void* data, unsigned threads, unsigned flags);

// The OpenMP runtime that the process has loaded already: torch's. Its workers wait actively between two operators of a
// model, so a pool of our own would fight them for the cores, and a second OpenMP runtime would bring one.
inline Parallel loaded_openmp() {
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return parallel;
}

template <typename Problem>
struct Shares {
  void (*run)(const Problem&, int64_t begin, int64_t end);
  const Problem& problem;
  int64_t share;
  std::atomic<int64_t> next;

  // Every thread takes shares until none is left, however many threads there are.
  static void take(void* data) {
    auto& self = *static_cast<Shares*>(data);
    for (int64_t begin; (begin = self.next.fetch_add(self.share)) < self.problem.m;)
      self.run(self.problem, begin, std::min(begin + self.share, self.problem.m));
  }
};

// run(problem, begin, end) over all rows.
template <typename Problem>
void over_rows(void (*run)(const Problem&, int64_t, int64_t), const Problem& problem, int threads) {
  const Parallel parallel = threads > 1 ? loaded_openmp() : nullptr;
  if (!parallel) return run(problem, 0, problem.m);
  Shares<Problem> shares{run, problem, ceil_div(problem.m, threads), {0}};
  parallel(Shares<Problem>::take, &shares, static_cast<unsigned>(threads), 0);
}

}  // namespace hwkern::cpu
