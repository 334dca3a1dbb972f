#include "tensorrt/log.h"

#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <mutex>

namespace hwkern::trt {

namespace {

constexpr size_t kSentenceBytes = 512;

std::atomic<LogCallback> callback{nullptr};
std::mutex last_mutex;
char last_sentence[kSentenceBytes] = "";

void emit(Severity severity, const char* sentence) {
  if (const LogCallback f = callback.load(std::memory_order_acquire)) {
    f(severity, sentence);
  } else if (severity <= kWarning) {
    std::fprintf(stderr, "hwkern TensorRT plugin: %s\n", sentence);
  }
}

}  // namespace

void set_log(LogCallback f) { callback.store(f, std::memory_order_release); }

void log(Severity severity, const char* format, ...) {
  char sentence[kSentenceBytes];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(sentence, sizeof sentence, format, arguments);
  va_end(arguments);
  emit(severity, sentence);
}

bool refuse(const char* format, ...) {
  char sentence[kSentenceBytes];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(sentence, sizeof sentence, format, arguments);
  va_end(arguments);
  {
    const std::lock_guard<std::mutex> lock(last_mutex);
    std::memcpy(last_sentence, sentence, sizeof sentence);
  }
  emit(kError, sentence);
  return false;
}

size_t last_error(char* text, size_t bytes) {
  const std::lock_guard<std::mutex> lock(last_mutex);
  if (text && bytes > 0) std::snprintf(text, bytes, "%s", last_sentence);
  return std::strlen(last_sentence);
}

}  // namespace hwkern::trt
