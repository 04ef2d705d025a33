"""The Swift file of a bundle: how an application loads the packages and calls their functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from string import Template

from export.bundle import MethodSpec, PromptSpec
from export.coreml.functions import Precision
from export.positions import ImageGrid

EXAMPLE_FILE = "CoreMLExample.swift"

# Prefill and decode are two MLModels that read and write one MLState, as Core ML allows where the states are the same.
_TEMPLATE = Template("""\
// How to run this bundle with Core ML (iOS 18, macOS 15 or later; Float16 needs Apple silicon).
//
// Written with the bundle and NOT compiled or run: it was made on a machine without Xcode. The packages themselves were
// executed there by an interpreter and compared with the source model; manifest.json says with what result.
//
// What the application adds: an image prepared as "image" in manifest.json says, and a tokenizer that reads
// tokenizer.json (swift-transformers does). golden.safetensors has inputs and expected outputs to test with.

import CoreML

@available(iOS 18.0, macOS 15.0, *)
final class VisionLanguageModel {
    typealias Scalar = $scalar

    static let imageTokens = $image_tokens  // rows of image features
    static let promptLength = $prompt  // rows that prefill takes
    static let textLength = $text  // text tokens of the longest prompt
    static let width = $width  // channels of a row
    static let padToken: Int32 = $pad
    static let endTokens: Set<Int32> = [$ends]
    /// Replace {question}, tokenize without special tokens, and split at the image token: head and tail.
    static let promptTemplate = $template
    static let imageToken: Int32 = $image_token

    private let vision, embedding, prefill, decode: MLModel

    /// - Parameter folder: the bundle. In an application, let Xcode compile the packages and load the .mlmodelc instead.
    init(folder: URL, computeUnits: MLComputeUnits = .all) async throws {
        let visionURL = try await MLModel.compileModel(at: folder.appending(path: "$vision_file"))
        let languageURL = try await MLModel.compileModel(at: folder.appending(path: "$language_file"))

        func load(_ url: URL, function: String? = nil) async throws -> MLModel {
            let configuration = MLModelConfiguration()
            configuration.computeUnits = computeUnits
            if let function { configuration.functionName = function }
            return try await MLModel.load(contentsOf: url, configuration: configuration)
        }
        vision = try await load(visionURL)
        embedding = try await load(languageURL, function: "token_embedding")
        prefill = try await load(languageURL, function: "prefill")
        decode = try await load(languageURL, function: "decode")
    }

    /// Answer greedily; the tokens of the answer, without the end token.
    ///
    /// - Parameters:
    ///   - pixelValues: $pixel_shape, see "image" in manifest.json.
    ///   - head, tail: the prompt's tokens before and after the image, at most `textLength` together.
    func answer(
        pixelValues: MLShapedArray<Scalar>, head: [Int32], tail: [Int32], maxNewTokens: Int = $new_tokens
    ) async throws -> [Int32] {
        precondition(head.count + tail.count <= Self.textLength, "the prompt is too long")
        let start = Self.textLength - head.count - tail.count

        // One call embeds the whole text, padded on the left.
        let text = Array(repeating: Self.padToken, count: start) + head + tail
        let rows = try await run(
            embedding, ["token_ids": MLFeatureValue(shapedArray: MLShapedArray(scalars: text, shape: [1, Self.textLength]))],
            output: "embeddings"
        ).scalars
$see

        // [pads][head][image features][tail]
        let split = (start + head.count) * Self.width
        let sequence = Array(rows[..<split]) + image + Array(rows[split...])
        let state = prefill.makeState()
        let startValue = Self.scalar(start)
        var logits = try await run(
            prefill,
            [
                "inputs_embeds": MLFeatureValue(
                    shapedArray: MLShapedArray(scalars: sequence, shape: [1, Self.promptLength, Self.width])),
                "start": startValue,$positions_input
            ],
            output: "logits", state: state
        )

        var tokens: [Int32] = []
        while tokens.count < min(maxNewTokens, $new_tokens) {
            let token = Self.argmax(logits.scalars)
            if Self.endTokens.contains(token) { break }
            tokens.append(token)
            // The first generated token has position promptLength, the next one more.
            let position = Self.promptLength + tokens.count - 1
            if tokens.count == min(maxNewTokens, $new_tokens) { break }
            logits = try await run(
                decode,
                [
                    "token": MLFeatureValue(shapedArray: MLShapedArray(scalars: [token], shape: [1, 1])),
                    "position": Self.scalar(position),
                    "start": startValue,
                ],
                output: "logits", state: state
            )
        }
        return tokens
    }

$positions_function    private func run(
        _ model: MLModel, _ inputs: [String: MLFeatureValue], output: String, state: MLState? = nil
    ) async throws -> MLShapedArray<Scalar> {
        let provider = try MLDictionaryFeatureProvider(dictionary: inputs)
        let result: MLFeatureProvider
        if let state {
            result = try await model.prediction(from: provider, using: state)
        } else {
            result = try await model.prediction(from: provider)
        }
        guard let values = result.featureValue(for: output)?.shapedArrayValue(of: Scalar.self) else {
            fatalError("the package has no output \\(output) of the type that the bundle's manifest says")
        }
        return values
    }

    private static func scalar(_ value: Int) -> MLFeatureValue {
        MLFeatureValue(shapedArray: MLShapedArray<Int32>(scalars: [Int32(value)], shape: [1]))
    }

    private static func argmax(_ values: [Scalar]) -> Int32 {
        Int32(values.indices.max { values[$$0] < values[$$1] }!)
    }
}
""")

# For a model whose image tokens have positions in two dimensions; `first` is the slot of the image's first row.
_POSITIONS = Template("""\
    /// Time, height and width of each slot, as "positions" of prefill in manifest.json says.
    private static func positions(first: Int, kept: [Int32]) -> MLFeatureValue {
        var values = (0..<3).flatMap { _ in (0..<Int32(promptLength)) }
        for axis in 0..<3 {
            for slot in 0..<promptLength {
                let at = axis * promptLength + slot
                if slot < first {
                    values[at] += $before
                } else if slot >= first + imageTokens {
                    values[at] += $after
                } else {
                    let place = kept[slot - first]
                    values[at] = Int32(first + $before) + [0, place / $columns, place % $columns][axis]
                }
            }
        }
        return MLFeatureValue(shapedArray: MLShapedArray(scalars: values, shape: [3, promptLength]))
    }

""")
_POSITIONS_INPUT = """
                "positions": Self.positions(first: start + head.count, kept: kept),"""
_SEE = """\
        let image = try await run(
            vision, ["pixel_values": MLFeatureValue(shapedArray: pixelValues)], output: "image_features"
        ).scalars"""
_SEE_ALL = """
        let kept = Array(0..<Int32(Self.imageTokens))  // every token of the image"""
_SEE_KEPT = """\
        let seen = try await vision.prediction(
            from: MLDictionaryFeatureProvider(dictionary: ["pixel_values": MLFeatureValue(shapedArray: pixelValues)]))
        guard let image = seen.featureValue(for: "image_features")?.shapedArrayValue(of: Scalar.self)?.scalars,
            let kept = seen.featureValue(for: "kept")?.shapedArrayValue(of: Int32.self)?.scalars
        else {
            fatalError("the vision package has not the outputs that the bundle's manifest says")
        }"""


def swift_example(specs: Mapping[str, MethodSpec], prompt: PromptSpec, precision: Precision) -> str:
    """The text of `CoreMLExample.swift` for a bundle with these methods."""
    _, length, width = specs["prefill"].inputs[0].shape
    grid = None if prompt.grid is None else ImageGrid(*prompt.grid, prompt.image_tokens)
    says_kept = len(specs["vision_encoder"].outputs) > 1
    return _TEMPLATE.substitute(
        see=_SEE_KEPT if says_kept else _SEE if grid is None else _SEE + _SEE_ALL,
        positions_input="" if grid is None else _POSITIONS_INPUT,
        positions_function=""
        if grid is None
        else _POSITIONS.substitute(before=grid.before, after=grid.after, columns=grid.width),
        scalar="Float16" if precision == "fp16" else "Float",
        image_tokens=prompt.image_tokens,
        prompt=length,
        text=prompt.max_text_tokens,
        width=width,
        pad=prompt.pad_token_id,
        ends=", ".join(str(token) for token in prompt.eos_token_ids),
        # A JSON string is a Swift string literal but for "\\/" and \\uXXXX, which json.dumps does not write here.
        template=json.dumps(prompt.template, ensure_ascii=False),
        image_token=prompt.image_token_id,
        vision_file=specs["vision_encoder"].file,
        language_file=specs["prefill"].file,
        pixel_shape=str(list(specs["vision_encoder"].inputs[0].shape)),
        new_tokens=prompt.max_new_tokens,
    )
