"""What a vector store gives away: in clear, by inversion, by comparison with known texts (`v2t audit`)."""
