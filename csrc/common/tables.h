// The 4-bit codes: what each code means and where one code ends and the next begins. Decimal literals below are exact for fp32.
#pragma once

#include "macros.h"

namespace bnb {

struct Levels16 {
    float value[16];
};

// NF4 (QLoRA, arXiv 2305.14314, appendix E): codes in the order of their values.
constexpr Levels16 kNF4Levels = {{
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
}};

// FP4: bit 3 is the sign, the low bits number the magnitudes 0, 1/192, 2/3, 1, 1/3, 1/2, 1/6, 1/4. Code 8 is a second +0; no quantiser writes it.
constexpr Levels16 kFP4Levels = {{
    0.0f,
    0.0052083334885537624f,
    0.6666666865348816f,
    1.0f,
    0.3333333432674408f,
    0.5f,
    0.1666666716337204f,
    0.25f,
    0.0f,
    -0.0052083334885537624f,
    -0.6666666865348816f,
    -1.0f,
    -0.3333333432674408f,
    -0.5f,
    -0.1666666716337204f,
    -0.25f,
}};

// A value v in [-1, 1] gets the NF4 code that counts the thresholds below it; a tie goes to the lower value.
struct NF4Thresholds {
    float value[15];
};

constexpr NF4Thresholds kNF4Thresholds = {{
    -0.8480963706970215f,
    -0.6106328964233398f,
    -0.4599952697753906f,
    -0.33967941999435425f,
    -0.23460739850997925f,
    -0.13791173696517944f,
    -0.045525018125772476f,
    0.03979014977812767f,
    0.120255246758461f,
    0.2035212516784668f,
    0.2920137643814087f,
    0.3893125355243683f,
    0.5016634464263916f,
    0.6427869200706482f,
    0.8614784479141235f,
}};

// FP4 counts thresholds below |v|; the count is the rank of the magnitude, kFP4CodeOfRank its low three bits. These are the published CUDA
// constants: a few lie some ulp beside the midpoint, and files written with them must be reproduced.
struct FP4Thresholds {
    float value[7];
};

constexpr FP4Thresholds kFP4Thresholds = {{0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f, 0.4166667f, 0.583333f, 0.8333333f}};

struct FP4CodeOfRank {
    unsigned char value[8];
};

constexpr FP4CodeOfRank kFP4CodeOfRank = {{0, 1, 6, 7, 4, 5, 2, 3}};

constexpr int kNF4ZeroCode = 7;
constexpr int kFP4ZeroCode = 0;

} // namespace bnb
