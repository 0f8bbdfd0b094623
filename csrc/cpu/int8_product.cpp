// LLM.int8(): out[M, N] = A . dequantised(CB)^T + bias, with the activations quantised and their outlier columns in floating point.
//
// One entry is sum_c(stat_mc * sum_{k of class c}(qa qb)) * SCB_n / 127^2, the inner sums exact in 32-bit integers, plus
// sum_j(a_mj * fl(fl(qb_nj SCB_n) / 127)) over the outlier columns j, plus the bias, all fp32, rounded once. Activations that come as codes have one
// statistic a token, and their sum over all columns is exact. The weight is read where it lies, N K bytes, once for every few hundred tokens; A is
// read twice, its codes and what its outlier columns hold stay in a cache.
//
// The work is a line of tiles, panel of the weight after panel of the weight; threads take stretches of it. K is never split: the result does not
// depend on the number of threads.
#include "int8_dot.h"
#include "int8_rows.h"
#include "panel.h"

namespace bnb {
namespace BNB_ISA {
namespace {

static_assert(kDotTokens <= kPanelTokens, "one tile of the outliers' product serves all tokens");

// The tokens that are multiplied together.
struct Tokens {
    int64_t first, count;
    const DotActivation* codes; // of each a row of `stride`
    int64_t stride;
    const float* scales;         // of each kLaneScales; or the statistic of each, for those that came as codes
    const uint32_t* corrections; // of each W for every stretch of K; or one
    const float* outliers;       // of each a row of as many as there are outlier columns
};

struct OutlierColumns {
    const int64_t* column;
    int64_t count;
};

// One thread's panels.
class ProductWorker {
  public:
    ProductWorker(const Int8ProductArgs& args, const OutlierColumns& columns, int64_t panel_rows)
        : args_(args), columns_(columns), panel_rows_(panel_rows), scratch_(cells_bytes() + Scratch::kAlignment),
          cells_(static_cast<float*>(scratch_.take(cells_bytes()))) {}

    bool is_ready() const { return columns_.count == 0 || cells_ != nullptr; }

    // Tiles [first, last) of the tokens against one panel.
    void multiply(const Tokens& tokens, const TokenTiles& tiles, int64_t first, int64_t last, int64_t panel) const {
        const int64_t row = panel * panel_rows_, rows = smaller(panel_rows_, args_.N - row);
        if (columns_.count > 0)
            gather_weights(row, rows);
        for (int64_t tile = first; tile < last; ++tile) {
            const int64_t token = tiles.begin(tile), count = tiles.size(tile);
            const DotActivation* codes = tokens.codes + token * tokens.stride;
            DotSource source{args_.CB + row * args_.K, codes, tokens.stride, args_.K, nullptr, nullptr};
            if (args_.quantises) {
                float sums[kDotTokens * kDotPanel];
                source.scales = tokens.scales + token * kLaneScales;
                source.corrections = tokens.corrections + token * stretches_of(args_.K) * W;
                dot_panel(source, rows, count, sums);
                write_floats(tokens, token, count, row, rows, [&](int64_t t, int64_t lane, const ScaleSources& from, int64_t width, auto* out) {
                    scale_row(sums + t * kDotPanel + lane, from, width, out);
                });
                continue;
            }
            uint32_t sums[kDotTokens * kDotPanel];
            dot_panel(source, rows, count, sums);
            if (args_.SCB == nullptr)
                write_integers(tokens, token, count, row, rows, sums);
            else
                write_floats(tokens, token, count, row, rows, [&](int64_t t, int64_t lane, const ScaleSources& from, int64_t width, auto* out) {
                    scale_row(sums + t * kDotPanel + lane, tokens.corrections[token + t], tokens.scales[token + t], from, width, out);
                });
        }
    }

  private:
    size_t cells_bytes() const { return size_t(columns_.count) * kDotPanel * sizeof(float); }

    // The dequantised outlier columns of a panel: strips of kPanelLanes rows, in each cells[column][row]. Rows beyond the last are 0.
    void gather_weights(int64_t row, int64_t rows) const {
        float* cells = cells_;
        for (int64_t lane = 0; lane < rows; lane += kPanelLanes) {
            const int64_t width = ceil_div(smaller(kPanelLanes, rows - lane), W) * W;
            for (int64_t j = 0; j < columns_.count; ++j, cells += width)
                for (int64_t i = 0; i < width; ++i) {
                    const int64_t n = row + lane + i;
                    const bool is_row = lane + i < rows;
                    cells[i] = is_row ? float(args_.CB[n * args_.K + columns_.column[j]]) * args_.SCB[n] * kPerInt8Code : 0.0f;
                }
        }
    }

    void write_integers(const Tokens& tokens, int64_t token, int64_t count, int64_t row, int64_t rows, const uint32_t* sums) const {
        for (int64_t t = 0; t < count; ++t) {
            int32_t* out = static_cast<int32_t*>(args_.out) + (tokens.first + token + t) * args_.N + row;
            const uint32_t correction = tokens.corrections[token + t];
            for (int64_t i = 0; i < rows; ++i)
                out[i] = int32_t(sums[t * kDotPanel + i] - correction);
        }
    }

    template <typename Scale>
    void write_floats(const Tokens& tokens, int64_t token, int64_t count, int64_t row, int64_t rows, const Scale& scale) const {
        with_element_type(args_.dtype,
                          [&](auto* element) { write_floats_as<std::remove_pointer_t<decltype(element)>>(tokens, token, count, row, rows, scale); });
    }

    // scale(t, lane, from, width, out) writes `width` entries of the tile's token t, from the panel's row `lane` on.
    template <typename T, typename Scale>
    void write_floats_as(const Tokens& tokens, int64_t token, int64_t count, int64_t row, int64_t rows, const Scale& scale) const {
        const int64_t J = columns_.count;
        const float* cells = cells_;
        for (int64_t lane = 0; lane < rows; lane += kPanelLanes) {
            const int64_t width = smaller(kPanelLanes, rows - lane), vectors = ceil_div(width, W);
            float outliers[kDotTokens * kPanelLanes];
            if (J > 0) {
                PanelTiles<FloatArithmetic>::of(count, vectors)(cells, tokens.outliers + token * J, J, J, true, outliers);
                cells += J * vectors * W;
            }
            for (int64_t t = 0; t < count; ++t) {
                const ScaleSources from{args_.SCB + row + lane, args_.bias != nullptr ? args_.bias + row + lane : nullptr,
                                        J > 0 ? outliers + t * vectors * W : nullptr};
                scale(t, lane, from, width, static_cast<T*>(args_.out) + (tokens.first + token + t) * args_.N + row + lane);
            }
        }
    }

    const Int8ProductArgs& args_;
    const OutlierColumns& columns_;
    int64_t panel_rows_;
    Scratch scratch_;
    float* cells_;
};

// Rows of the weight that a core's second-level cache holds, beside a tile of tokens. A single tile has no use for them again: then few, so that
// threads share them evenly.
int64_t rows_of_panel(int64_t K, int64_t tiles) {
    constexpr int64_t kPanelCache = 512 << 10;
    const int64_t fitting = kPanelCache / (K + 1) / 16 * 16;
    return tiles == 1 || fitting < 16 ? 16 : smaller(fitting, kDotPanel);
}

// Costs in products of codes.
constexpr int64_t kReadingAByte = 8, kFloatProduct = 8;
constexpr int64_t kCostPerThread = int64_t(2) << 20; // waking and joining a thread

int32_t multiply_tokens(const Int8ProductArgs& args, const OutlierColumns& columns, const Tokens& tokens) {
    const TokenTiles tiles = TokenTiles::of(tokens.count, kDotTokens);
    const int64_t panel_rows = rows_of_panel(args.K, tiles.count);
    const int64_t tokens_of_tile = ceil_div(tokens.count, tiles.count);
    const int64_t cost_of_tile = panel_rows * (args.K * (kReadingAByte + tokens_of_tile) + kFloatProduct * columns.count * tokens_of_tile + 1);
    const int64_t grain = ceil_div(kCostPerThread, cost_of_tile);
    return try_parallel(ceil_div(args.N, panel_rows) * tiles.count, grain, args.threads, [&](int64_t begin, int64_t end) -> int32_t {
        const ProductWorker worker(args, columns, panel_rows);
        if (!worker.is_ready())
            return kOutOfMemory;
        while (begin < end) {
            const int64_t first = begin % tiles.count;
            const int64_t count = smaller(tiles.count - first, end - begin);
            worker.multiply(tokens, tiles, first, first + count, begin / tiles.count);
            begin += count;
        }
        return kOk;
    });
}

// Tokens of the product, prepared a chunk at a time in memory taken once.
class Preparation {
  public:
    Preparation(const Int8ProductArgs& args, int64_t outliers)
        : args_(args), outliers_(outliers), stride_(ceil_div(args.K + 1, kDotLanes) * kDotLanes), scales_(args.quantises ? kLaneScales : 1),
          sums_(args.quantises ? stretches_of(args.K) * W : 1), chunk_(smaller(args.M, most_tokens())),
          scratch_(size_t(chunk_ * bytes_of_token() + outliers * int64_t(sizeof(int64_t))) + 6 * Scratch::kAlignment) {
        column_ = take<int64_t>(outliers);
        codes_ = take<DotActivation>(chunk_ * stride_);
        bytes_ = take<int8_t>(chunk_ * stride_);
        lane_scales_ = take<float>(chunk_ * scales_);
        corrections_ = take<uint32_t>(chunk_ * sums_);
        values_ = take<float>(chunk_ * outliers);
    }

    bool is_ready() const { return values_ != nullptr; } // the last piece
    int64_t chunk() const { return chunk_; }

    OutlierColumns columns() {
        if (args_.outlier_columns != nullptr)
            return {args_.outlier_columns, outliers_};
        for (int64_t k = 0, j = 0; j < outliers_; ++k)
            if (args_.is_outlier[k])
                column_[j++] = k;
        return {column_, outliers_};
    }

    template <typename T> Tokens prepare(const OutlierColumns& columns, int64_t first, int64_t count) {
        const int64_t K = args_.K;
        const uint8_t* is_outlier = outliers_ > 0 ? args_.is_outlier : nullptr;
        parallel_for(count, ceil_div(kProductsPerThread / 16, K + 1), args_.threads, [&](int64_t begin, int64_t end, int) {
            for (int64_t token = begin; token < end; ++token) {
                const T* x = static_cast<const T*>(args_.A) + (first + token) * K;
                if (args_.quantises)
                    quantise(x, is_outlier, token);
                else
                    take_codes(first, token);
                for (int64_t j = 0; j < outliers_; ++j)
                    values_[token * outliers_ + j] = to_float(x[columns.column[j]]);
            }
        });
        return {first, count, codes_, stride_, lane_scales_, corrections_, values_};
    }

  private:
    static constexpr int64_t kMostBytes = 4 << 20;

    int64_t bytes_of_token() const {
        return stride_ * int64_t(sizeof(DotActivation) + sizeof(int8_t)) + (outliers_ + scales_ + sums_) * int64_t(sizeof(float));
    }

    int64_t most_tokens() const {
        const int64_t fitting = kMostBytes / bytes_of_token(), least = 8 * kDotTokens;
        return fitting > least ? fitting : least;
    }

    template <typename T> void quantise(const T* x, const uint8_t* is_outlier, int64_t token) const {
        const ClassScales scales = class_scales(x, args_.K, args_.limit);
        int8_t* codes = bytes_ + token * stride_;
        class_codes(x, args_.K, scales, is_outlier, codes);
        DotActivation* packed = codes_ + token * stride_;
        pack_codes(codes, args_.K, stride_, packed);
        lane_corrections(packed, args_.K, corrections_ + token * sums_);
        lane_scales(scales.scale, lane_scales_ + token * scales_);
    }

    void take_codes(int64_t first, int64_t token) const {
        const int8_t* codes = args_.codes + (first + token) * args_.K;
        pack_codes(codes, args_.K, stride_, codes_ + token * stride_);
        corrections_[token] = total_correction(codes, args_.K);
        lane_scales_[token] = args_.row_stats != nullptr ? args_.row_stats[first + token] : 0.0f;
    }

    template <typename Element> Element* take(int64_t count) { return static_cast<Element*>(scratch_.take(size_t(count) * sizeof(Element))); }

    const Int8ProductArgs& args_;
    int64_t outliers_, stride_, scales_, sums_, chunk_;
    Scratch scratch_;
    int64_t* column_;
    DotActivation* codes_;
    int8_t* bytes_;
    float* lane_scales_;
    uint32_t* corrections_;
    float* values_;
};

// Fills is_outlier and counts.
int64_t find_all_outliers(const Int8ProductArgs& args) {
    const Int8QuantizeArgs columns{args.A, args.M, args.K, args.dtype, args.limit, args.is_outlier, nullptr, nullptr};
    parallel_for(args.K, ceil_div(kProductsPerThread / 16, args.M + 1), args.threads,
                 [&](int64_t begin, int64_t end, int) { int8_find_outliers(columns, begin, end); });
    int64_t count = 0;
    for (int64_t k = 0; k < args.K; ++k)
        count += args.is_outlier[k];
    return count;
}

} // namespace

int32_t int8_product(const Int8ProductArgs& args) {
    const bool looks_for_outliers = args.quantises && args.is_outlier != nullptr;
    Preparation preparation(args, looks_for_outliers ? find_all_outliers(args) : args.outliers);
    if (!preparation.is_ready())
        return kOutOfMemory;
    const OutlierColumns columns = preparation.columns();
    for (int64_t first = 0; first < args.M; first += preparation.chunk()) {
        int32_t status = kOk;
        with_element_type(args.dtype, [&](auto* element) {
            using T = std::remove_pointer_t<decltype(element)>;
            status = multiply_tokens(args, columns, preparation.template prepare<T>(columns, first, smaller(preparation.chunk(), args.M - first)));
        });
        if (status != kOk)
            return status;
    }
    return kOk;
}

} // namespace BNB_ISA
} // namespace bnb
