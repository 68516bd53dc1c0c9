#include "cusparselt/layout.h"

#include <iterator>
#include <string>

#include "cusparselt/helpers.h"
#include "cusparselt/plan.h"
#include "cusparselt/scratch.h"

namespace slidejax::cusparselt {
namespace {

// A matrix that the library compresses again and again with small changes.
class Probe {
 public:
  Probe(DType operand, int64_t outputs, int64_t columns)
      : operand_(operand),
        outputs_(RoundUp<int64_t>(outputs, Multiple(operand))),
        columns_(columns),
        scratch_("learning the compressed form of " + std::string(Name(operand)) + " [" +
                 std::to_string(outputs) + ", " + std::to_string(columns) + "]"),
        size_(SizeOfCompressed(operand, outputs, columns)),
        values_bytes_(outputs_ * columns / 2 * static_cast<int64_t>(Bytes(operand))),
        dense_(scratch_.Allocate(outputs_ * columns * Bytes(operand))),
        window_(scratch_.Allocate(4 * Bytes(operand))),
        buffer_(scratch_.Allocate(size_.buffer)),
        before_(scratch_.Allocate(size_.compressed)),
        after_(scratch_.Allocate(size_.compressed)),
        difference_(static_cast<Difference*>(scratch_.Allocate(sizeof(Difference)))) {
    Check(FillWindows(operand, dense_, outputs_ * windows(), false, scratch_.stream));
    Check(FillWindows(operand, window_, 1, true, scratch_.stream));
    Compress(before_);
  }

  int64_t rows() const { return outputs_; }
  int64_t windows() const { return columns_ / 4; }

  // Returns the address of the nibble of a window, or -1 if other than one nibble changes with it.
  int64_t AddressOf(int64_t row, int64_t window) {
    const int64_t bytes = 4 * static_cast<int64_t>(Bytes(operand_));
    char* at = static_cast<char*>(dense_) + (row * windows() + window) * bytes;
    Check(cudaMemcpyAsync(at, window_, bytes, cudaMemcpyDeviceToDevice, scratch_.stream));
    Compress(after_);
    Check(FillWindows(operand_, at, 1, false, scratch_.stream));
    const auto skip = [&](void* form) { return static_cast<char*>(form) + values_bytes_; };
    const Difference found = Differing(skip(before_), skip(after_),
                                       static_cast<int64_t>(size_.compressed) - values_bytes_);
    return found.count == 1 ? static_cast<int64_t>(found.last) : -1;
  }

  // Returns whether PackCompressed writes the library's bytes for a random weight. It writes over
  // them, so that what it leaves alone counts as equal, and what it writes to a wrong place does
  // not.
  bool Agrees(const Layout& layout) {
    const int64_t groups = outputs_ * windows();
    void* values = scratch_.Allocate(2 * groups * Bytes(operand_));
    auto* zeros = static_cast<uint8_t*>(scratch_.Allocate(groups));
    Check(FillPacked(operand_, values, zeros, groups, scratch_.stream));
    ExpandArgs expand = {};
    expand.values = values, expand.zeros = zeros, expand.lifted = dense_, expand.type = operand_;
    expand.outputs = expand.padded_outputs = outputs_, expand.groups = windows(), expand.group = 4;
    Check(ExpandLifted(expand, scratch_.stream));
    Compress(before_);
    Check(cudaMemcpyAsync(after_, before_, size_.compressed, cudaMemcpyDeviceToDevice,
                          scratch_.stream));
    PackArgs pack = {};
    pack.values = values, pack.zeros = zeros, pack.compressed = after_, pack.type = operand_;
    pack.outputs = pack.padded_outputs = outputs_, pack.groups = windows(), pack.group = 4;
    pack.layout = layout;
    // No more bytes than the windows take, so that padding stays the library's.
    pack.compressed_bytes = values_bytes_ + groups / 2;
    Check(PackCompressed(pack, scratch_.stream));
    return Differing(before_, after_, static_cast<int64_t>(size_.compressed)).count == 0;
  }

 private:
  void Check(cudaError_t status) { CheckCuda(status, "learning the compressed form"); }

  void Compress(void* form) {
    cusparselt::Compress(operand_, outputs_, columns_, dense_, form, buffer_, scratch_.stream);
  }

  Difference Differing(const void* a, const void* b, int64_t bytes) {
    Difference found = {};
    Check(Compare(a, b, bytes, difference_, scratch_.stream));
    Check(cudaMemcpyAsync(&found, difference_, sizeof(found), cudaMemcpyDeviceToHost,
                          scratch_.stream));
    scratch_.Wait();
    return found;
  }

  DType operand_;
  int64_t outputs_, columns_;
  Scratch scratch_;
  CompressedSize size_;
  int64_t values_bytes_;
  void *dense_, *window_, *buffer_, *before_, *after_;
  Difference* difference_;
};

}  // namespace

std::optional<Layout> LearnLayout(DType operand, int64_t outputs, int64_t columns) {
  Probe probe(operand, outputs, columns);
  Layout layout = {};
  layout.base = probe.AddressOf(0, 0);
  if (layout.base < 0) return std::nullopt;
  for (int bit = 0; bit < Layout::kBits; ++bit) {
    const int64_t number = int64_t{1} << bit;
    const auto learn = [&](int64_t count, int64_t row, int64_t window, int64_t* term) {
      if (number >= count) return true;
      const int64_t address = probe.AddressOf(row, window);
      *term = address - layout.base;
      return address >= 0;
    };
    if (!learn(probe.rows(), number, 0, &layout.of_row[bit]) ||
        !learn(probe.windows(), 0, number, &layout.of_window[bit]))
      return std::nullopt;
  }
  if (probe.rows() >> Layout::kBits || probe.windows() >> Layout::kBits) return std::nullopt;
  layout.run = RunOf(layout);
  if (layout.run < 2 || !probe.Agrees(layout)) return std::nullopt;
  return layout;
}

std::vector<int64_t> ToNumbers(const Layout& layout) {
  std::vector<int64_t> numbers = {layout.base};
  numbers.insert(numbers.end(), std::begin(layout.of_row), std::end(layout.of_row));
  numbers.insert(numbers.end(), std::begin(layout.of_window), std::end(layout.of_window));
  numbers.push_back(layout.run);
  return numbers;
}

std::optional<Layout> FromNumbers(const int64_t* numbers, size_t count) {
  if (count != 2 + 2 * Layout::kBits) return std::nullopt;
  Layout layout = {};
  layout.base = *numbers++;
  for (int64_t& term : layout.of_row) term = *numbers++;
  for (int64_t& term : layout.of_window) term = *numbers++;
  layout.run = *numbers;
  return layout;
}

}  // namespace slidejax::cusparselt
