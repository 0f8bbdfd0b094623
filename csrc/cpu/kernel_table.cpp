// The entry of one instruction set. Compiled once for each set.
#include "kernels.h"

#define BNB_QUOTE(name) #name
#define BNB_NAME_OF(macro) BNB_QUOTE(macro)

namespace bnb {
namespace BNB_ISA {

const KernelTable kernel_table = {
    BNB_NAME_OF(BNB_ISA), quantize_4bit,      dequantize_4bit,    quantize_blockwise,    dequantize_blockwise, gemm_4bit,
    gemm_4bit_backward,   int8_find_outliers, int8_quantize_rows, int8_quantize_columns, int8_dequantize_rows, int8_scale_rows,
    int8_product,         int8_backward,      optimizer_step,     optimizer_measure,
};

} // namespace BNB_ISA
} // namespace bnb
