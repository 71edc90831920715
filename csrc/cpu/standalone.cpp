// Compiled once for each instruction set, like resident.cpp.
#include "standalone.h"

#include <vector>

#include "resident/conv_nhwc.h"
#include "gate_step.h"
#include "variant.h"
#include "compacted/winograd_nchwc.h"

// Makes the compiler believe that vector registers are looked at, so that every round is needed.
#if defined(__aarch64__)
#define SKIPNET_REGISTER "+w"
#else
#define SKIPNET_REGISTER "+x"
#endif
#define SKIPNET_KEEP(p, q, r, s) \
    asm volatile("" : SKIPNET_REGISTER(p), SKIPNET_REGISTER(q), SKIPNET_REGISTER(r), SKIPNET_REGISTER(s))

namespace skipnet::cpu {
namespace {

// A type of our own, so that no vector of a common type is instantiated for this instruction set.
struct Image {
    float* data;
};

// As the resident engine runs it.
template <typename Operand>
class Bordered final : public Standalone {
public:
    Bordered(const ConvolutionWeights& weights, int batch, int height, int width)
        : channels_(weights.in), out_channels_(weights.out),
          in_{height, width, channels_in_memory(weights)}, scratch_({in_}, batch) {
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
        const ThreadGroup alone{0, 1, nullptr};
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

// As the compacted engine runs it; with a kernel of 7 as its stem.
template <typename Operand>
class Blocked final : public Standalone {
    using Element = typename Operand::Element;

public:
    Blocked(const ConvolutionWeights& weights, int batch, int height, int width)
        : channels_(weights.in), out_channels_(weights.out), stem_(weights.kernel == 7),
          phases_{height, width, weights.in, weights.kernel, weights.stride},
          in_(weights.kernel == 1 ? blocked::unbordered(height, width, weights.in)
                                  : blocked::bordered(height, width, weights.in, weights.stride)),
          out_(blocked::unbordered((height - 1) / weights.stride + 1, (width - 1) / weights.stride + 1, weights.out)),
          runs_(in_.blocks()) {
        if (stem_)
            first_ = blocked::make_first<Operand>(weights, phases_, out_);
        else
            layer_ = blocked::make_layer<Operand>(weights, in_, out_);
        shared_ = BufferOf<Element>(stem_ ? 0 : layer_->shared());
        own_ = Buffer(stem_ ? 0 : layer_->own());
        for (int image = 0; image < batch; ++image) {
            images_.emplace_back(stem_ ? phases_.size() : 0);
            x_.emplace_back(stem_ ? 0 : in_.size());
            y_.emplace_back(out_.size());
        }
    }

    void load(const float* x) override {
        for (std::size_t image = 0; image < x_.size(); ++image)
            for (int y = 0; y < in_.height; ++y)
                for (int column = 0; column < in_.width; ++column)
                    for (int c = 0; c < channels_; ++c, ++x) {
                        if (stem_)
                            images_[image].get()[phases_.at(c, y, column)] = *x;
                        else
                            x_[image].get()[place(in_, y, column, c)] = Operand::rounded(*x);
                    }
    }

    void run() override {
        // One after another would not share the weights: all together, as in the engine, up to its number.
        constexpr std::size_t kMaxImages = 8;
        const ThreadGroup alone{0, 1, nullptr};
        for (std::size_t first = 0; first < x_.size(); first += kMaxImages) {
            const float* images[kMaxImages];
            const Element* inputs[kMaxImages];
            Element* outputs[kMaxImages];
            int count = 0;
            for (std::size_t i = first; i < x_.size() && i < first + kMaxImages; ++i, ++count) {
                images[count] = images_[i].get();
                inputs[count] = x_[i].get();
                outputs[count] = y_[i].get();
            }
            if (stem_)
                first_->run({images, outputs, nullptr, count}, blocked::Finish::relu, alone, {});
            else
                layer_->run({inputs, outputs, nullptr, count}, blocked::Finish::relu, alone,
                            {shared_.get(), own_.get(), runs_.data()});
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
    static std::size_t place(const blocked::Plane& plane, int y, int x, int channel) {
        return static_cast<std::size_t>(channel / kWidth) * plane.block() + plane.at(y, x) + channel % kWidth;
    }

    int channels_, out_channels_;
    bool stem_;
    blocked::PhasePlane phases_;
    blocked::Plane in_, out_;
    std::unique_ptr<blocked::Layer<Float32, Operand>> first_;   // the one that is asked for
    std::unique_ptr<blocked::Layer<Operand, Operand>> layer_;
    BufferOf<Element> shared_;
    Buffer own_;
    std::vector<blocked::Run> runs_;
    std::vector<Buffer> images_;
    std::vector<BufferOf<Element>> x_, y_;
};

class Gate final : public StandaloneGate {
public:
    Gate(const Embedding& embedding, const Lstm& lstm)
        : channels_(embedding.channels), embedding_(embedding.weight, embedding.bias, channels_, lstm.embed),
          cell_(lstm), feature_(lstm.embed), hidden_lanes_(cell_.lanes()), cell_lanes_(2 * cell_.lanes()) {}

    void step(int batch, const float* pooled, float* hidden, float* cell, float* logit) override {
        const std::size_t bytes = cell_.hidden() * sizeof(float);
        for (int image = 0; image < batch; ++image, hidden += cell_.hidden(), cell += cell_.hidden()) {
            std::memcpy(hidden_lanes_.get(), hidden, bytes);
            std::memcpy(cell_lanes_.get(), cell, bytes);
            embedding_.run(pooled + static_cast<std::size_t>(image) * channels_, feature_.get());
            logit[image] = cell_.step(feature_.get(), hidden_lanes_.get(), cell_lanes_.get());
            std::memcpy(hidden, hidden_lanes_.get(), bytes);
            std::memcpy(cell, cell_lanes_.get(), bytes);
        }
    }

private:
    int channels_;
    Linear embedding_;
    LstmCell cell_;
    Buffer feature_, hidden_lanes_, cell_lanes_;
};

template <typename Operand>
std::unique_ptr<Standalone> make(const ConvolutionWeights& weights, bool compacted, int batch, int height, int width) {
    if (compacted) return std::make_unique<Blocked<Operand>>(weights, batch, height, width);
    return std::make_unique<Bordered<Operand>>(weights, batch, height, width);
}

}  // namespace

std::unique_ptr<Standalone> SKIPNET_VARIANT(make_standalone)(const ConvolutionWeights& weights, bool compacted,
                                                             [[maybe_unused]] bool bfloat16, int batch, int height,
                                                             int width) {
#if defined(__AMX_BF16__)
    // Tile registers are the resident engine's so far.
    if (bfloat16 && compacted) return std::make_unique<Blocked<BFloat16>>(weights, batch, height, width);
    if (bfloat16) return std::make_unique<Bordered<AmxBFloat16>>(weights, batch, height, width);
#elif defined(__AVX512BF16__)
    if (bfloat16) return make<BFloat16>(weights, compacted, batch, height, width);
#endif
    return make<Float32>(weights, compacted, batch, height, width);
}

std::unique_ptr<StandaloneGate> SKIPNET_VARIANT(make_gate)(const Embedding& embedding, const Lstm& lstm) {
    return std::make_unique<Gate>(embedding, lstm);
}

double SKIPNET_VARIANT(multiply_add)(long rounds) {
    // Twelve chains: more than the latency times the throughput of any core so far.
    const Vector factor = broadcast(0.5f), term = broadcast(1.0f);
    Vector a = term, b = term, c = term, d = term, e = term, f = term;
    Vector g = term, h = term, i = term, j = term, k = term, l = term;
    for (long round = 0; round < rounds; ++round) {
        a = a * factor + term, b = b * factor + term, c = c * factor + term, d = d * factor + term;
        e = e * factor + term, f = f * factor + term, g = g * factor + term, h = h * factor + term;
        i = i * factor + term, j = j * factor + term, k = k * factor + term, l = l * factor + term;
        SKIPNET_KEEP(a, b, c, d);
        SKIPNET_KEEP(e, f, g, h);
        SKIPNET_KEEP(i, j, k, l);
    }
    return 2.0 * 12 * kWidth * static_cast<double>(rounds);
}

}  // namespace skipnet::cpu
