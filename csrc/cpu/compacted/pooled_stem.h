// The first convolution and the 3x3 max pool after it, in one pass, for one instruction set. A thread convolves a few
// rows, pools them while they are in its cache, and keeps the last of them for the next ones: what is pooled, four
// times as large as the result, is never written to memory.
#pragma once

#include "conv_nchwc.h"

namespace skipnet::cpu {
namespace {

// NaN if either is.
inline Vector larger(Vector a, Vector b) { return a < b || b != b ? b : a; }

template <typename Operand>
class PooledStem {
    using Element = typename Operand::Element;

    static constexpr int kRows = 2;  // of the result at a time

public:
    PooledStem(const ConvolutionWeights& layer, const FirstPlane<Operand>& in, const Plane& out)
        : height_((in.height + in.stride - 1) / in.stride), out_(out),
          band_{2 * kRows + 1, (in.width + in.stride - 1) / in.stride, out.channels, 1, 1},
          conv_(make_first<Operand>(layer, in, band_)) {}

    std::size_t band() const { return band_.size(); }

    // band: this thread's, [band()], zeros at first, nothing else's.
    void run(const Element* input, Element* output, Element* band, const ThreadGroup& group, Ahead& ahead) const {
        group.share(out_.height, [&](int begin, int end) {
            for (int y = begin; y < end; y += kRows) {
                int ready = 0;
                if (y > begin) {
                    copy_row(band, 2 * kRows, 0);
                    ready = 1;
                }
                const int rows = end - y < kRows ? end - y : kRows;
                convolve(input, band, 2 * y - 1, ready, 2 * rows + 1, ahead);
                for (int row = 0; row < rows; ++row) pool(band, row, output, y + row);
            }
        });
    }

private:
    // The band's rows begin .. end - 1; `first`: its first one among all. Inputs of the pool are not negative: zeros
    // stand for what is outside.
    void convolve(const Element* input, Element* band, int first, int begin, int end, Ahead& ahead) const {
        for (; begin < end && first + begin < 0; ++begin) clear_row(band, begin);
        const int inside = first + end < height_ ? end : height_ - first;
        if (begin < inside) conv_->rows(input, first + begin, band, begin, inside - begin, Finish::relu, ahead);
        for (int row = inside; row < end; ++row) clear_row(band, row);
    }

    void copy_row(Element* band, int from, int to) const {
        for (int block = 0; block < band_.blocks(); ++block, band += band_.block())
            std::memcpy(band + band_.at(to, 0), band + band_.at(from, 0), band_.width * kWidth * sizeof(Element));
    }

    void clear_row(Element* band, int row) const {
        for (int block = 0; block < band_.blocks(); ++block, band += band_.block())
            std::memset(band + band_.at(row, 0), 0, band_.width * kWidth * sizeof(Element));
    }

    // The band's rows 2 * row and the two below it to the result's row y.
    void pool(const Element* band, int row, Element* output, int y) const {
        const int down = band_.row();
        for (int block = 0; block < band_.blocks(); ++block) {
            const Element* top = band + static_cast<std::ptrdiff_t>(block) * band_.block() + band_.at(2 * row, -1);
            Element* to = output + static_cast<std::ptrdiff_t>(block) * out_.block() + out_.at(y, 0);
            const auto column = [&](const Element* from) {
                return larger(larger(Operand::widen(from), Operand::widen(from + down)),
                              Operand::widen(from + 2 * down));
            };
            Vector left = column(top);
            for (int x = 0; x < out_.width; ++x, to += kWidth) {
                const Vector middle = column(top += kWidth), right = column(top += kWidth);
                Operand::narrow(to, larger(larger(left, middle), right));
                left = right;
            }
        }
    }

    int height_;  // of what is pooled
    Plane out_, band_;
    std::unique_ptr<First<Operand>> conv_;
};

}  // namespace
}  // namespace skipnet::cpu
