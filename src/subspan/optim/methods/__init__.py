"""One recipe a file: a class whose defaults are the paper's and whose method names the parts."""
