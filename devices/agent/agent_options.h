// The agent's command line, and how it says what is wrong.

#pragma once

#include <getopt.h>
#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

constexpr long kMostSamples = 1'000'000;  // MAX_SAMPLES of the protocol

// What is wrong, for a user: one sentence without the final stop.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline std::string quoted(const std::string& text) { return "'" + text + "'"; }

struct Options {
  std::string model;
  std::string method = "forward";
  std::string inputs;  // empty: made up
  std::string etdump;  // empty: no trace
  std::vector<int> cpus;  // empty: all
  long threads = 1;
  long warmup = 2;
  long iterations = 10;
  double min_seconds = 0;
};

inline long integer(const std::string& option, const std::string& text, long least, long most) {
  char* end = nullptr;
  errno = 0;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (text.empty() || *end != '\0' || errno != 0 || value < least || value > most) {
    throw Fault(option + " " + quoted(text) + " is no whole number from " + std::to_string(least) + " to " +
                std::to_string(most));
  }
  return value;
}

inline double seconds(const std::string& option, const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value >= 0 && value <= 86400)) {
    throw Fault(option + " " + quoted(text) + " is no number of seconds from 0 to 86400");
  }
  return value;
}

inline std::vector<int> cores(const std::string& option, const std::string& text) {
  std::vector<int> found;
  for (size_t start = 0; start <= text.size() && !text.empty();) {
    const size_t end = std::min(text.find(',', start), text.size());
    found.push_back(static_cast<int>(integer(option, text.substr(start, end - start), 0, CPU_SETSIZE - 1)));
    start = end + 1;
  }
  return found;
}

inline void print_version() { std::puts("{\"schema\": 1, \"agent\": \"cpp\", \"runtime\": \"" AGENT_RUNTIME "\"}"); }

inline Options parse(int argc, char** argv) {
  const option known[] = {
      {"model", required_argument, nullptr, 'm'},      {"method", required_argument, nullptr, 'f'},
      {"inputs", required_argument, nullptr, 'i'},     {"threads", required_argument, nullptr, 't'},
      {"cpus", required_argument, nullptr, 'c'},       {"warmup", required_argument, nullptr, 'w'},
      {"iterations", required_argument, nullptr, 'n'}, {"min-seconds", required_argument, nullptr, 's'},
      {"etdump", required_argument, nullptr, 'e'},     {"version", no_argument, nullptr, 'v'},
      {nullptr, 0, nullptr, 0},
  };
  Options options;
  opterr = 0;  // it is said in JSON
  for (int code; (code = getopt_long(argc, argv, "", known, nullptr)) != -1;) {
    const std::string value = optarg ? optarg : "";
    switch (code) {
      case 'm': options.model = value; break;
      case 'f': options.method = value; break;
      case 'i': options.inputs = value; break;
      case 't': options.threads = integer("--threads", value, 1, 4096); break;
      case 'c': options.cpus = cores("--cpus", value); break;
      case 'w': options.warmup = integer("--warmup", value, 0, kMostSamples); break;
      case 'n': options.iterations = integer("--iterations", value, 1, kMostSamples); break;
      case 's': options.min_seconds = seconds("--min-seconds", value); break;
      case 'e': options.etdump = value; break;
      case 'v': print_version(); std::exit(0);
      default: throw Fault("option " + quoted(argv[optind - 1]) + " is unknown or lacks its value");
    }
  }
  if (optind < argc) throw Fault("argument " + quoted(argv[optind]) + " belongs to no option");
  if (options.model.empty()) throw Fault("--model is missing; give a .pte file");
  return options;
}
