// The agent of a device without Python: times one method of an ExecuTorch program, and prints one JSON object on its last
// line, as devices/agent/protocol.py describes it: an answer (exit code 0), or what is wrong (exit code 3).
//
// It needs the shared libraries of ExecuTorch's wheel beside it and nothing else; python_agent.py does the same in Python.

#include <fcntl.h>
#include <sched.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include <executorch/devtools/etdump/etdump_flatcc.h>

#include "agent_options.h"
#include "agent_tensors.h"

// The wheel has this library but not its header.
namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool

namespace {

using executorch::etdump::ETDumpGen;

constexpr int kFailed = 3;              // exit code
constexpr size_t kLongestError = 1900;  // bytes; the protocol takes 2,000 characters

// ---- the machine ----

// Milliseconds. RAW is the hardware's own clock, which nobody adjusts while we measure.
double now(clockid_t clock) {
  timespec time{};
  clock_gettime(clock, &time);
  return static_cast<double>(time.tv_sec) * 1e3 + static_cast<double>(time.tv_nsec) / 1e6;
}

// Threads take over what their maker is bound to: this goes before anything that starts one.
void bind(const std::vector<int>& cpus) {
  if (cpus.empty()) return;
  cpu_set_t wanted, bound;
  CPU_ZERO(&wanted);
  std::string listed;
  for (const int cpu : cpus) {
    CPU_SET(cpu, &wanted);
    listed += (listed.empty() ? "" : ",") + std::to_string(cpu);
  }
  // The kernel leaves out cores that it does not have, and only complains when none is left.
  if (sched_setaffinity(0, sizeof wanted, &wanted) != 0 || sched_getaffinity(0, sizeof bound, &bound) != 0 ||
      !CPU_EQUAL(&wanted, &bound)) {
    throw Fault("this process cannot be bound to cores " + quoted(listed) + "; the machine has " +
                std::to_string(sysconf(_SC_NPROCESSORS_CONF)) + ", numbered from 0, and may not give us all");
  }
}

// Before a method is loaded: what XNNPACK has prepared for one pool is of no use to another.
void set_threads(long threads) {
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (pool == nullptr) throw Fault("ExecuTorch has no thread pool on this processor");
  if (pool->get_thread_count() != static_cast<size_t>(threads)) {
    pool->_unsafe_reset_threadpool(static_cast<uint32_t>(threads));
  }
  if (pool->get_thread_count() != static_cast<size_t>(threads)) {
    throw Fault("the thread pool has " + std::to_string(pool->get_thread_count()) + " threads instead of " +
                std::to_string(threads));
  }
}

// Most memory that this process has had resident, in kB; -1 where the kernel does not say. Not getrusage: a child takes
// over its parent's maximum there.
long peak_memory() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmHWM:", 0) == 0) return std::atol(line.c_str() + 6);
  }
  return -1;
}

// A piece of work that is always the same and lives in the first-level cache; returns its milliseconds. What slows it beside
// a call has slowed the call too: a clock that went down, or another machine's work on the same core.
double beat() {
  constexpr int kValues = 4096, kTurns = 300;
  static float values[kValues] = {};
  const double start = now(CLOCK_MONOTONIC_RAW);
  for (int turn = 0; turn < kTurns; ++turn) {
    for (float& value : values) value = value * 0.5F + 1.0F;
    asm volatile("" : : "r"(values) : "memory");  // every turn is taken
  }
  return now(CLOCK_MONOTONIC_RAW) - start;
}

// ---- the measurement ----

struct Result {
  double load_ms = 0;
  double first_ms = 0;
  double total_ms = 0;
  std::vector<double> wall_ms;
  std::vector<double> beat_ms;  // before the first call and after each
  long peak_rss_kb = -1;
  std::vector<Checksum> outputs;
  size_t etdump_bytes = 0;
};

void check_method(Module& module, const Options& options) {
  auto found = module.method_names();
  check(found.error(), "the methods of " + quoted(options.model) + " cannot be listed");
  std::vector<std::string> names(found->begin(), found->end());
  std::sort(names.begin(), names.end());
  if (std::find(names.begin(), names.end(), options.method) != names.end()) return;
  std::string listed;
  for (const auto& name : names) listed += (listed.empty() ? "" : ", ") + name;
  throw Fault("there is no method " + quoted(options.method) + "; there are: " + listed);
}

// Load the program and the method; returns how long the two took.
double load(Module& module, const Options& options) {
  const double start = now(CLOCK_MONOTONIC_RAW);
  // A damaged file is refused here instead of crashing later.
  check(module.load(executorch::runtime::Program::Verification::InternalConsistency),
        "program " + quoted(options.model) + " cannot be loaded");
  check_method(module, options);
  check(module.load_method(options.method), "method " + quoted(options.method) + " cannot be loaded");
  return now(CLOCK_MONOTONIC_RAW) - start;
}

// Milliseconds of a call.
template <typename Use>
double call(Module& module, const Options& options, const Inputs& inputs, Use use) {
  const double start = now(CLOCK_MONOTONIC_RAW);
  auto outputs = module.execute(options.method, inputs.values);
  const double end = now(CLOCK_MONOTONIC_RAW);
  check(outputs.error(), "method " + quoted(options.method) + " failed");
  use(*outputs);
  return end - start;
}

void measure(Module& module, const Options& options, const Inputs& inputs, ETDumpGen* tracer, Result& result) {
  const auto ignore = [](const std::vector<EValue>&) {};
  // Later calls may find other values in the program's own buffers, and their outputs differ.
  const auto keep = [&](const std::vector<EValue>& values) {
    for (const auto& value : values) {
      if (value.isTensor()) result.outputs.push_back(add_up(value.toTensor()));
    }
  };
  for (long i = 0; i < options.warmup; ++i) {
    const double ms = i == 0 ? call(module, options, inputs, keep) : call(module, options, inputs, ignore);
    if (i == 0) result.first_ms = ms;
  }
  if (tracer != nullptr) tracer->reset();  // what is traced is what is counted
  double spent = 0;
  result.beat_ms.push_back(beat());
  // A second clock around all calls: single readings that lie do not add up to it.
  const double start = now(CLOCK_MONOTONIC);
  for (long i = 0; i < kMostSamples && (i < options.iterations || spent < options.min_seconds * 1e3); ++i) {
    const bool first = i == 0 && options.warmup == 0;
    const double ms = first ? call(module, options, inputs, keep) : call(module, options, inputs, ignore);
    if (first) result.first_ms = ms;
    result.wall_ms.push_back(ms);
    result.beat_ms.push_back(beat());
    spent += ms;
  }
  result.total_ms = now(CLOCK_MONOTONIC) - start;
}

size_t write_trace(ETDumpGen& tracer, const std::string& path) {
  const auto trace = tracer.get_etdump_data();
  const std::unique_ptr<void, void (*)(void*)> owner(trace.buf, std::free);
  if (trace.buf == nullptr || trace.size == 0) throw Fault("the trace is empty");
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(static_cast<const char*>(trace.buf), static_cast<std::streamsize>(trace.size));
  file.close();
  if (!file) throw Fault("trace " + quoted(path) + " cannot be written: " + std::strerror(errno));
  return trace.size;
}

Result run(const Options& options) {
  const int handle = open(options.model.c_str(), O_RDONLY | O_CLOEXEC);
  struct stat status {};
  if (handle < 0 || fstat(handle, &status) != 0) {
    throw Fault("program " + quoted(options.model) + " cannot be read: " + std::strerror(errno));
  }
  close(handle);
  if (!S_ISREG(status.st_mode)) throw Fault("program " + quoted(options.model) + " is no file");

  bind(options.cpus);
  set_threads(options.threads);
  auto owned = options.etdump.empty() ? nullptr : std::make_unique<ETDumpGen>();
  ETDumpGen* tracer = owned.get();
  // Methods that share buffers (`prefill` and `decode` share caches) need one memory: otherwise each silently has its own.
  Module module(options.model, Module::LoadMode::Mmap, std::move(owned), nullptr, nullptr,
                /*share_memory_arenas=*/true);
  Result result;
  result.load_ms = load(module, options);
  const Inputs inputs = make_inputs(module, options);
  measure(module, options, inputs, tracer, result);
  result.peak_rss_kb = peak_memory();
  if (tracer != nullptr) result.etdump_bytes = write_trace(*tracer, options.etdump);
  return result;
}

// ---- JSON ----

std::string text(const std::string& value) {
  std::string json = "\"";
  for (const char c : value) {
    if (c == '"' || c == '\\') {
      json += '\\';
      json += c;
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
      json += escaped;
    } else {
      json += c;
    }
  }
  return json + '"';
}

// What is not finite is written as Python's json reads it.
std::string number(double value, const char* format = "%.17g") {
  if (std::isnan(value)) return "NaN";
  if (std::isinf(value)) return value > 0 ? "Infinity" : "-Infinity";
  char digits[400];  // the largest double in %f
  std::snprintf(digits, sizeof digits, format, value);
  return digits;
}

std::string milliseconds(double value) { return number(value, "%.6f"); }

template <typename List, typename Format>
std::string list(const List& values, Format format) {
  std::string json = "[";
  for (const auto& value : values) {
    if (json.size() > 1) json += ", ";
    json += format(value);
  }
  return json + "]";
}

std::string to_json(const Options& options, const Result& result) {
  const auto checksum = [](const Checksum& output) {
    return "{\"shape\": " + list(output.shape, [](long size) { return std::to_string(size); }) +
           ", \"sum\": " + number(output.sum) + ", \"abs\": " + number(output.abs) + "}";
  };
  return "{\"schema\": 1, \"agent\": \"cpp\", \"runtime\": " + text(AGENT_RUNTIME) +
         ", \"method\": " + text(options.method) + ", \"threads\": " + std::to_string(options.threads) +
         ", \"load_ms\": " + milliseconds(result.load_ms) + ", \"first_ms\": " + milliseconds(result.first_ms) +
         ", \"total_ms\": " + milliseconds(result.total_ms) +
         ", \"peak_rss_kb\": " + (result.peak_rss_kb < 0 ? "null" : std::to_string(result.peak_rss_kb)) +
         ", \"outputs\": " + list(result.outputs, checksum) +
         ", \"etdump_bytes\": " + std::to_string(result.etdump_bytes) +
         ", \"wall_ms\": " + list(result.wall_ms, milliseconds) +
         ", \"beat_ms\": " + list(result.beat_ms, milliseconds) + "}";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse(argc, argv);
    const Result result = run(options);
    std::puts(to_json(options, result).c_str());
    return 0;
  } catch (const std::exception& error) {
    std::puts(("{\"schema\": 1, \"error\": " + text(std::string(error.what()).substr(0, kLongestError)) + "}").c_str());
    return kFailed;
  }
}
