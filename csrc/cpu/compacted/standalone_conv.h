// One convolution as the compacted engine runs it, by itself; for one instruction set.
#pragma once

#include <vector>

#include "../batch_slice.h"
#include "../standalone.h"
#include "winograd_nchwc.h"

namespace skipnet::cpu {
namespace {

// With a kernel of 7 as the engine's stem.
template <typename Operand>
class ConvNchwc final : public StandaloneConv {
    using Element = typename Operand::Element;

public:
    ConvNchwc(const ConvolutionWeights& weights, int batch, int height, int width)
        : channels_(weights.in), out_channels_(weights.out), stem_(weights.kernel == 7),
          first_plane_{height, width, weights.in, weights.kernel, weights.stride},
          in_(weights.kernel == 1 ? unbordered(height, width, weights.in)
                                  : bordered(height, width, weights.in, weights.stride)),
          out_(unbordered((height - 1) / weights.stride + 1, (width - 1) / weights.stride + 1, weights.out)),
          runs_(in_.blocks()) {
        if (stem_)
            layer_ = make_first<Operand>(weights, first_plane_, out_);
        else
            layer_ = make_layer<Operand>(weights, in_, out_);
        shared_ = BufferOf<Element>(layer_->shared());
        own_ = Buffer(layer_->own());
        for (int image = 0; image < batch; ++image) {
            x_.emplace_back(stem_ ? first_plane_.size() : in_.size());
            y_.emplace_back(out_.size());
        }
    }

    void load(const float* x) override {
        for (BufferOf<Element>& image : x_)
            for (int y = 0; y < in_.height; ++y, x += in_.width * channels_)
                for (int c = 0; c < channels_; ++c) {
                    const auto pixel = [&](int column) { return x[column * channels_ + c]; };
                    if (stem_)
                        first_plane_.set_row(image.get(), c, y, pixel);
                    else
                        for (int column = 0; column < in_.width; ++column)
                            image.get()[place(in_, y, column, c)] = Operand::rounded(pixel(column));
                }
    }

    void run() override {
        // One after another would not share the weights: all together, as in the engine, up to its number.
        const ThreadGroup alone;
        Ahead ahead;
        for (std::size_t first = 0; first < x_.size(); first += kMaxImages) {
            const Element* inputs[kMaxImages];
            Element* outputs[kMaxImages];
            int count = 0;
            for (std::size_t i = first; i < x_.size() && i < first + kMaxImages; ++i, ++count) {
                inputs[count] = x_[i].get();
                outputs[count] = y_[i].get();
            }
            layer_->run({inputs, outputs, nullptr, count}, Finish::relu, alone,
                        {shared_.get(), own_.get(), runs_.data(), &ahead});
        }
    }

    void read(float* y) const override {
        for (const BufferOf<Element>& image : y_)
            for (int row = 0; row < out_.height; ++row)
                for (int column = 0; column < out_.width; ++column)
                    for (int c = 0; c < out_channels_; c += kWidth) {
                        float lanes[kWidth];
                        store(lanes, Operand::widen(image.get() + place(out_, row, column, c)));
                        for (int lane = 0; lane < kWidth && c + lane < out_channels_; ++lane) *y++ = lanes[lane];
                    }
    }

    int out_height() const override { return out_.height; }
    int out_width() const override { return out_.width; }

private:
    static std::size_t place(const Plane& plane, int y, int x, int channel) {
        return static_cast<std::size_t>(channel / kWidth) * plane.block() + plane.at(y, x) + channel % kWidth;
    }

    int channels_, out_channels_;
    bool stem_;
    FirstPlane<Operand> first_plane_;
    Plane in_, out_;
    std::unique_ptr<Layer<Operand, Operand>> layer_;
    BufferOf<Element> shared_;
    Buffer own_;
    std::vector<Run> runs_;
    std::vector<BufferOf<Element>> x_, y_;
};

}  // namespace
}  // namespace skipnet::cpu
