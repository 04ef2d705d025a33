// What goes into a method, and what is told of what comes out.

#pragma once

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor_ptr.h>
#include <executorch/runtime/core/exec_aten/util/scalar_type_util.h>

#include "agent_options.h"

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::Error;
using executorch::runtime::EValue;

constexpr size_t kPadding = 64;  // bytes that vector kernels may read past the end of an input

inline void check(Error error, const std::string& what) {
  if (error != Error::Ok) {
    throw Fault(what + ": " + executorch::runtime::to_string(error) + " (code " +
                std::to_string(static_cast<uint32_t>(error)) + ")");
  }
}

inline std::vector<uint8_t> read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<uint8_t> content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file) throw Fault("inputs " + quoted(path) + " cannot be read: " + std::strerror(errno));
  return content;
}

// The same numbers on every machine and in the Python agent: a linear congruential generator, values in [-1, 1).
class MadeUp {
 public:
  float next() {
    state_ = state_ * 1664525u + 1013904223u;
    return static_cast<float>(state_ >> 8) / 8388608.0f - 1.0f;
  }

 private:
  uint32_t state_ = 12345;
};

template <typename T>
void fill(void* data, size_t bytes, MadeUp& source) {
  T* values = static_cast<T*>(data);
  for (size_t i = 0; i < bytes / sizeof(T); ++i) values[i] = static_cast<T>(source.next());
}

// Floats are made up, everything else is zero: the one index that every table has.
inline void make_up(ScalarType type, std::vector<uint8_t>& memory, size_t bytes, MadeUp& source) {
  switch (type) {
    case ScalarType::Half: fill<executorch::aten::Half>(memory.data(), bytes, source); break;
    case ScalarType::BFloat16: fill<executorch::aten::BFloat16>(memory.data(), bytes, source); break;
    case ScalarType::Float: fill<float>(memory.data(), bytes, source); break;
    case ScalarType::Double: fill<double>(memory.data(), bytes, source); break;
    default: break;
  }
}

inline bool supported(ScalarType type) {
  switch (type) {
    case ScalarType::Byte: case ScalarType::Char: case ScalarType::Short: case ScalarType::Int: case ScalarType::Long:
    case ScalarType::Half: case ScalarType::Float: case ScalarType::Double: case ScalarType::Bool:
    case ScalarType::BFloat16: case ScalarType::UInt16: case ScalarType::UInt32: case ScalarType::UInt64:
      return true;
    default:
      return false;
  }
}

// Tensors and the memory that they look at.
struct Inputs {
  std::vector<std::vector<uint8_t>> memory;
  std::vector<TensorPtr> tensors;
  std::vector<EValue> values;
};

inline Inputs make_inputs(Module& module, const Options& options) {
  auto meta = module.method_meta(options.method);
  check(meta.error(), "method " + quoted(options.method) + " cannot be described");
  std::vector<executorch::runtime::TensorInfo> infos;
  size_t total = 0;
  for (size_t i = 0; i < meta->num_inputs(); ++i) {
    const std::string where = "input " + std::to_string(i) + " of " + quoted(options.method);
    auto info = meta->input_tensor_meta(i);
    if (!info.ok()) throw Fault(where + " is no tensor; methods that take tensors alone can be timed");
    if (!supported(info->scalar_type())) {
      throw Fault(where + " has dtype " + std::to_string(static_cast<int>(info->scalar_type())) +
                  "; accepted: integers, bool, float16, bfloat16, float32, float64");
    }
    total += info->nbytes();
    infos.push_back(*info);
  }
  std::vector<uint8_t> raw;
  if (!options.inputs.empty()) {
    raw = read_file(options.inputs);
    if (raw.size() != total) {
      throw Fault("inputs " + quoted(options.inputs) + " have " + std::to_string(raw.size()) + " bytes; method " +
                  quoted(options.method) + " takes " + std::to_string(total));
    }
  }
  Inputs inputs;
  MadeUp source;
  size_t offset = 0;
  for (const auto& info : infos) {
    auto& memory = inputs.memory.emplace_back(info.nbytes() + kPadding);
    if (options.inputs.empty()) {
      make_up(info.scalar_type(), memory, info.nbytes(), source);
    } else {
      std::copy_n(raw.begin() + static_cast<std::ptrdiff_t>(offset), info.nbytes(), memory.begin());
      offset += info.nbytes();
    }
    const auto sizes = info.sizes();
    const auto order = info.dim_order();
    inputs.tensors.push_back(executorch::extension::make_tensor_ptr(
        {sizes.begin(), sizes.end()}, memory.data(), {order.begin(), order.end()}, {}, info.scalar_type()));
  }
  inputs.values.assign(inputs.tensors.begin(), inputs.tensors.end());
  return inputs;
}

// ---- outputs ----

struct Checksum {
  std::vector<long> shape;
  double sum = 0;
  double abs = 0;
};

template <typename T>
void add_up(const Tensor& tensor, Checksum& checksum) {
  const T* values = tensor.const_data_ptr<T>();
  for (auto i = tensor.numel(); i > 0; --i, ++values) {
    const double value = static_cast<double>(*values);
    checksum.sum += value;
    checksum.abs += std::fabs(value);
  }
}

inline Checksum add_up(const Tensor& tensor) {
  Checksum checksum;
  checksum.shape.assign(tensor.sizes().begin(), tensor.sizes().end());
  switch (tensor.scalar_type()) {
    case ScalarType::Byte: add_up<uint8_t>(tensor, checksum); break;
    case ScalarType::Char: add_up<int8_t>(tensor, checksum); break;
    case ScalarType::Short: add_up<int16_t>(tensor, checksum); break;
    case ScalarType::Int: add_up<int32_t>(tensor, checksum); break;
    case ScalarType::Long: add_up<int64_t>(tensor, checksum); break;
    case ScalarType::Half: add_up<executorch::aten::Half>(tensor, checksum); break;
    case ScalarType::Float: add_up<float>(tensor, checksum); break;
    case ScalarType::Double: add_up<double>(tensor, checksum); break;
    case ScalarType::Bool: add_up<bool>(tensor, checksum); break;
    case ScalarType::BFloat16: add_up<executorch::aten::BFloat16>(tensor, checksum); break;
    case ScalarType::UInt16: add_up<uint16_t>(tensor, checksum); break;
    case ScalarType::UInt32: add_up<uint32_t>(tensor, checksum); break;
    case ScalarType::UInt64: add_up<uint64_t>(tensor, checksum); break;
    default:
      throw Fault("an output has dtype " + std::to_string(static_cast<int>(tensor.scalar_type())) +
                  "; accepted: integers, bool, float16, bfloat16, float32, float64");
  }
  return checksum;
}
