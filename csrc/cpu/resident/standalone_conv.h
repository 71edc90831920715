// One convolution as the resident engine runs it, by itself; for one instruction set.
#pragma once

#include <vector>

#include "../batch_slice.h"
#include "../standalone.h"
#include "conv_nhwc.h"

namespace skipnet::cpu {
namespace {

// A type of our own, so that no vector of a common type is instantiated for this instruction set.
struct Image {
    float* data;
};

template <typename Operand>
class ConvNhwc final : public StandaloneConv {
public:
    ConvNhwc(const ConvolutionWeights& weights, int batch, int height, int width)
        : channels_(weights.in), out_channels_(weights.out), in_{height, width, channels_in_memory(weights)},
          scratch_({in_}, batch) {
        if (by_winograd(weights)) {
            winograd_ = std::make_unique<Winograd<Operand>>(weights, in_.channels);
            out_ = {height, width, winograd_->out_channels()};
        } else {
            direct_ = std::make_unique<Direct<Operand>>(weights, in_.channels);
            out_ = direct_->out(in_);
        }
        for (int image = 0; image < batch; ++image) {
            x_.emplace_back(in_.size());
            y_.emplace_back(out_.size());
        }
        for (int image = 0; image < batch; ++image) {
            inputs_.push_back({x_[image].get()});
            outputs_.push_back({y_[image].get()});
        }
    }

    void load(const float* x) override {
        for (Buffer& image : x_)
            for (int y = 0; y < in_.height; ++y)
                for (int column = 0; column < in_.width; ++column, x += channels_)
                    std::memcpy(image.get() + in_.at(y, column), x, channels_ * sizeof(float));
    }

    void run() override {
        const ThreadGroup alone;
        const int batch = static_cast<int>(x_.size());
        const float* const* inputs = &inputs_[0].data;
        float* const* outputs = &outputs_[0].data;
        if (winograd_)
            winograd_->run(in_, inputs, outputs, false, nullptr, batch, alone, scratch_);
        else
            direct_->run(in_, inputs, outputs, true, batch, alone, scratch_);
    }

    void read(float* y) const override {
        for (const Buffer& image : y_)
            for (int row = 0; row < out_.height; ++row)
                for (int column = 0; column < out_.width; ++column, y += out_channels_)
                    std::memcpy(y, image.get() + out_.at(row, column), out_channels_ * sizeof(float));
    }

    int out_height() const override { return out_.height; }
    int out_width() const override { return out_.width; }

private:
    static int channels_in_memory(const ConvolutionWeights& weights) {
        if (by_winograd(weights)) return padded(weights.in > weights.out ? weights.in : weights.out);
        return Operand::kPack > 1 ? padded(weights.in) : weights.in;
    }
    static bool by_winograd(const ConvolutionWeights& weights) { return weights.kernel == 3 && weights.stride == 1; }

    int channels_, out_channels_;
    Plane in_, out_;
    Scratch<Operand> scratch_;
    std::unique_ptr<Winograd<Operand>> winograd_;
    std::unique_ptr<Direct<Operand>> direct_;
    std::vector<Buffer> x_, y_;
    std::vector<Image> inputs_, outputs_;
};

}  // namespace
}  // namespace skipnet::cpu
