from ._functions import matmul_4bit as matmul_4bit
